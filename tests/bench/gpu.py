"""`python -m tests.bench.gpu`: the core on a GPU, at the size of a large model; no network.

Activations are synthetic, with a spectrum like that of a residual stream. The published procedures
run on a part of the tokens where all would take too long; the size of each line says which.
`--size tiny` runs anywhere, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkmatter.activations import Tokens
from darkmatter.autoencoders import sparse_encode
from darkmatter.geometry import neighbour_cosines
from darkmatter.leastsquares import LinearStatistics
from darkmatter.models import Model, open_model
from darkmatter.pursuit import gradient_pursuit
from darkmatter.splicing import splice
from darkmatter.suites import EMBEDDED
from tests.bench import measure, published
from tests.bench.__main__ import line, run_case, write
from tests.bench.rows import (
    ROOT,
    ROWS,
    Case,
    at_least,
    jump_relu,
    planted,
    residual_stream,
    same_atoms,
)

RESULTS = ROOT / "book" / "results" / "bench_gpu.json"
FORMAT = "darkmatter-bench-gpu/1"


@dataclass(frozen=True)
class Size:
    """Widths, tokens of each work, and the tokens that the published procedures get."""

    d: int
    m: int
    k: int
    fit: int
    encode: int
    pursue: int
    published: int
    ranks: tuple[int, ...]
    model: dict[str, int]
    contexts: int


SIZES = {
    "large": Size(
        3584, 1 << 17, 60, 300_000, 1 << 16, 8192, 512, (1, 10, 100),
        {"n_embd": 1024, "n_layer": 8, "n_head": 16, "vocab_size": 32_000, "n_positions": 512}, 128,
    ),
    "tiny": Size(
        24, 256, 4, 2000, 64, 64, 32, (1, 10),
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 200, "n_positions": 48}, 4,
    ),
}  # fmt: skip


def cases(size: Size, device: torch.device, folder: Path) -> Iterator[tuple[str, Case]]:
    """The lines of the table, each with the row whose formulas it has."""
    yield "fit", _fit(size, device)
    x, atoms = (t.to(device) for t in planted(size.encode, size.m, size.d, size.k))
    yield "sparse", _encode(size, x, atoms)
    yield "pursuit", _pursuit(size, x[: size.pursue], atoms)
    yield "neighbours", _neighbours(size, atoms)
    del x, atoms
    yield "splice", _splice(size, device, folder)


def _fit(size: Size, device: torch.device) -> Case:
    n, d = size.fit, size.d
    block = residual_stream(min(n, 30_000), d).to(device)
    tiles = n // len(block)
    error = 0.1 * block + 0.3 * torch.randn(block.shape, device=device)
    half = max(1, tiles // 2)
    stored = block.repeat(half, 1), error.repeat(half, 1)

    def ours() -> Tensor:
        moments = LinearStatistics(d, d)
        for _ in range(tiles):
            for rows, target in zip(block.split(8192), error.split(8192), strict=True):
                moments.partial_fit(rows, target)
        return moments.solve().weight

    def check(weight: Tensor, solution: Tensor) -> float:
        rows = (block[:1000] - block.mean(0)).double()
        return measure.difference(rows @ solution[:-1].double(), rows @ weight)

    return Case(
        size=f"fit: d = {d}, {tiles * len(block):,} tokens, 1 SAE; published: {len(stored[0]):,}",
        ours=ours,
        published=lambda: published.least_squares(*stored),
        check=check,
        tolerance=1e-2,
        met=at_least(1),
        part=half / tiles,
        work=4.0 * tiles * len(block) * d * d,
        rate="float64",
    )


def _encode(size: Size, x: Tensor, atoms: Tensor) -> Case:
    sae = jump_relu(atoms, torch.zeros(size.d, device=x.device), size.k).to(x.device)
    few = x[: 4 * size.published]

    def check(mine: Any, dense: Tensor) -> float:
        first = type(mine)(mine.values[:64], mine.indices[:64])
        return measure.difference(first.dense(size.m), dense[:64])

    return Case(
        size=f"encode: d = {size.d}, m = {size.m}, {len(x):,} tokens; published: {len(few):,}",
        ours=lambda: sparse_encode(sae, x),
        published=lambda: sae.encode(few),
        check=check,
        tolerance=1e-4,
        met=at_least(1),
        part=len(few) / len(x),
        work=2.0 * len(x) * size.m * size.d,
    )


def _pursuit(size: Size, x: Tensor, atoms: Tensor) -> Case:
    n, first = len(x), size.published
    l0 = torch.full((n,), size.k)

    return Case(
        size=f"d = {size.d}, m = {size.m}, k = {size.k}, {n:,} tokens; published: {first}",
        ours=lambda: gradient_pursuit(x, atoms, l0),
        published=lambda: published.gradient_pursuit(x[:first], atoms, l0[:first]),
        check=lambda code, dense: same_atoms(code, dense, 0.9),
        tolerance=1e-3,
        met=at_least(3),
        part=first / n,
        work=2.0 * n * size.k * size.m * size.d,
    )


def _neighbours(size: Size, atoms: Tensor) -> Case:
    return Case(
        size=f"m = {size.m}, d = {size.d}; published: by 100 rows",
        ours=lambda: neighbour_cosines(atoms, size.ranks),
        published=lambda: published.neighbour_cosines(atoms, size.ranks),
        check=measure.difference,
        tolerance=1e-4,
        met=lambda _ratio, _seconds, share: share >= 0.7,
        work=2.0 * size.m**2 * size.d,
    )


def _splice(size: Size, device: torch.device, folder: Path) -> Case:
    model = _random_model(size, device, folder)
    length = size.model["n_positions"]
    ids = torch.randint(
        1, model.vocabulary, (size.contexts, length), generator=torch.Generator().manual_seed(1)
    )
    tokens = Tokens(ids, torch.arange(size.contexts), tuple(map(str, range(size.contexts))))
    hook = f"blocks.{model.n_layer // 2 - 1}.hook_resid_post"
    variants = {str(share): lambda x, share=share: share * x for share in (0.9, 0.7, 0.5, 0.3)}

    def check(found: Any, expected: dict[str, tuple[Tensor, Tensor]]) -> float:
        return max(
            measure.difference(mine[name].cpu(), expected[name][which].cpu())
            for which, mine in enumerate((found.cross_entropy, found.kl))
            for name in variants
        )

    return Case(
        size=f"random GPT-2, d = {model.d_model}, {model.n_layer} blocks, "
        f"{size.contexts} contexts of {length}, 4 variants at the middle",
        ours=lambda: splice(model, tokens, hook, variants, 16),
        published=lambda: published.splice(model, tokens, hook, variants, 16),
        check=check,
        tolerance=1e-3,
        met=at_least(1.4),
    )


def _random_model(size: Size, device: torch.device, folder: Path) -> Model:
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(1)
    config = transformers.GPT2Config(**size.model, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    # It is given token ids only, but a model's folder has to have a tokenizer.
    for file in (EMBEDDED["pydocs"] / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    return open_model(folder, device=str(device))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write; by default the book's results")
    asked = parser.parse_args(arguments)
    if asked.size == "large" and not torch.cuda.is_available():
        parser.error("size large needs a CUDA device, and there is none; try --size tiny")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # TF32 would be wrong in the fourth digit; what is compared here is float32.
    torch.set_float32_matmul_precision("highest")
    start = time.perf_counter()
    edge = 256 if asked.size == "tiny" else 8192
    machine: dict[str, Any] = {
        "float32": measure.product_rate(torch.float32, edge, device.type),
        "float64": measure.product_rate(torch.float64, edge, device.type),
        "memory": measure.bandwidth(edge * edge, device.type),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases(SIZES[asked.size], device, Path(folder)):
            rows.append(run_case(name, ROWS[name], case, machine.__getitem__, asked.repeats))
            print(line(rows[-1]), flush=True)
    on_gpu = device.type == "cuda"
    results = {
        "format": FORMAT,
        "device": torch.cuda.get_device_name() if on_gpu else measure.processor(),
        "torch": torch.__version__,
        "size": asked.size,
        "seconds": time.perf_counter() - start,
        **machine,
        "rows": rows,
    }
    out = asked.out or (RESULTS if on_gpu and asked.size == "large" else None)
    if out is not None:
        write(out, results)


if __name__ == "__main__":
    main()
