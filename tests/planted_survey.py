"""A survey made up by hand, for the tests of its report: no model, no SAE, milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from darkmatter.activations import Tokens
from darkmatter.leastsquares import LinearMap
from darkmatter.survey import Survey

HOOK = "blocks.2.hook_resid_post"
CONTEXTS, LENGTH, SKIP, D = 24, 40, 8, 4
PIECES = {0: "<|endoftext|>", 1: "<script>alert(1)</script>", 2: " the", 3: "\n", 4: "</textarea>",
          5: ' "quoted"', 6: "&amp;", 7: "$x$", 8: " 日本", 9: "\t"}  # fmt: skip


def planted_survey(
    saes: Mapping[str, tuple[int, float]] | None = None,
    downstream: bool = True,
    documents: int = CONTEXTS,
    skip: int = SKIP,
    hooks: Mapping[str, str] | None = None,
    n_fit: int = 4000,
    ridge: float = 0.0,
    seed: int = 0,
) -> Survey:
    """`saes`: name -> (width, L0), by default five widths at L0 8.

    FVU = .18 + 3 width^-.45 - .02 log2(L0 / 8), of it nonlinear .14 - .02 log2(L0 / 8).
    """
    saes = saes or {f"width {2**k}": (2**k, 8.0) for k in range(9, 14)}
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    frames: dict[str, pd.DataFrame] = {}
    tokens = rng.integers(1, len(PIECES), (CONTEXTS, LENGTH))
    tokens[:, 0] = 0
    document = np.arange(CONTEXTS) % documents
    context, position = (
        one.ravel() for one in np.meshgrid(range(CONTEXTS), range(skip, LENGTH - 1), indexing="ij")
    )
    for name, (width, l0) in saes.items():
        fvu = 0.18 + 3 * width**-0.45 - 0.02 * np.log2(l0 / 8)
        rest = 0.14 - 0.02 * np.log2(l0 / 8)
        share = 1 - rest / fvu
        scores = {
            "fvu": fvu, "fvu_nonlinear": rest, "r2_vector": share - 0.01, "r2_vector_pooled": share,
            "r2_scalar": 0.4 * share, "r2_norm": 0.7 - 0.02 * np.log2(width / 512), "l0": l0,
        }  # fmt: skip
        if downstream:
            scores |= {
                "cross_entropy_original": 3.0, "cross_entropy": 3.0 + fvu, "cost": fvu,
                "kl": fvu / 2, "recovered_linear": share, "recovered_nonlinear": 0.8,
                "kl_linear": fvu / 4, "kl_nonlinear": fvu / 8,
            }  # fmt: skip
        row: dict[str, Any] = {
            "name": name, "hook": (hooks or {}).get(name, HOOK), "d_sae": width,
            "dead": 0.03, "n_fit": n_fit, "n_test": len(context), "floor": np.nan,
        }  # fmt: skip
        for score, value in scores.items():
            row |= {score: value, f"{score}_low": 0.97 * value, f"{score}_high": 1.03 * value}
        rows.append(row)
        x2 = rng.gamma(20, 5, len(context))
        predicted = fvu * x2 * rng.lognormal(0, 0.1, len(context))
        error = predicted * rng.lognormal(0, 0.3, len(context))
        frames[name] = pd.DataFrame(
            {
                "document": document[context], "context": context, "position": position,
                "token": tokens[context, position], "loss": rng.gamma(2, 1.5, len(context)),
                "l0": rng.poisson(l0, len(context)), "x_norm2": x2, "error_norm2": error,
                "linear_norm2": error * share, "nonlinear_norm2": error * (1 - share),
                "predicted_norm2": predicted,
            }
        )  # fmt: skip
    one_map = LinearMap(
        torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64), ridge, n_fit
    )
    names = tuple(f"<doc & {i}>.txt" for i in range(documents))
    test = Tokens(torch.from_numpy(tokens), torch.from_numpy(document), names)
    settings = {
        "format": "darkmatter-survey/1",
        "identity": "f" * 64,
        "model": {"name": "toy/<model>", "d_model": D, "backend": "bridge"},
        "versions": {"torch": "2.9.1", "nnsight": None},
        "inputs": {"model": "0" * 64},
        "settings": {"skip": skip, "seed": 0, "special": [0], "downstream": downstream},
        "documents": {"fit": list(names)},
    }
    return Survey(
        pd.DataFrame(rows).set_index("name"),
        frames,
        dict.fromkeys(saes, one_map),
        dict.fromkeys(saes, one_map),
        {},
        test,
        test,
        skip,
        settings,
        dict(PIECES),
    )


GRID = {f"{w}-l{l0:g}": (w, l0) for w in (512, 2048, 8192) for l0 in (4.0, 8.0, 16.0, 64.0)}
