"""Pages of latents against dense codes in memory, and their files."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bs4 import BeautifulSoup, Tag

from darkmatter import _latent_html
from darkmatter._refusal import Refusal
from darkmatter.activations import Batch, Tokens
from darkmatter.latents import (
    LatentPage,
    _Gathered,
    _lottery,
    latent_page,
    latent_pages,
    residual_directions,
    write_latents,
)
from darkmatter.leastsquares import LinearMap
from darkmatter.models import open_model
from tests.conftest import D_MODEL, HOOK, VOCABULARY, write_model
from tests.test_report import self_contained

SKIP = 4


@pytest.fixture(scope="module")
def documents(tiny_model: Any) -> Tokens:
    """Thirty contexts of ten documents with names that need escaping; token 0 is special."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, VOCABULARY, (30, tiny_model.n_context), generator=generator)
    tokens[:, 0] = 0
    tokens[::3, 11] = 0
    return Tokens(tokens, torch.arange(30) // 3, tuple(f"<doc> & {i}" for i in range(10)))


@pytest.fixture(scope="module")
def sae(tiny_saes: dict[str, Any]) -> Any:
    """A JumpReLU SAE that Neuronpedia is said to host, with one dead latent of no direction."""
    found = copy.deepcopy(tiny_saes["jumprelu"])
    found.cfg.metadata.neuronpedia_id = "tiny/1-res"
    found.threshold[7] = 1e9
    found.W_dec[7] = 0
    return found


@pytest.fixture(scope="module")
def truth(tiny_model: Any, documents: Tokens, sae: Any) -> SimpleNamespace:
    """Everything dense: x, code f [c, p, m] with NaN where nothing is measured."""
    x = tiny_model.activations(documents.tokens, HOOK)
    flat = x.reshape(-1, D_MODEL)
    f = sae.encode(flat).view(*x.shape[:2], -1)
    counts = documents.tokens != 0
    counts[:, :SKIP], counts[:, -1] = False, False
    error = (flat - sae.decode(sae.encode(flat)))[counts.flatten()].double()
    f[~counts] = math.nan
    return SimpleNamespace(f=f, counts=counts, x=flat[counts.flatten()].double(), error=error)


@pytest.fixture(scope="module")
def error_map() -> LinearMap:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64) * 0.1
    return LinearMap(weight, torch.ones(D_MODEL, dtype=torch.float64), 0.0, 1000)


@pytest.fixture(scope="module")
def pages(
    tiny_model: Any, documents: Tokens, sae: Any, error_map: LinearMap
) -> dict[int, LatentPage]:
    return latent_pages(tiny_model, sae, documents, range(20), SKIP, 6, error_map)


def test_counts_and_histogram_are_those_of_the_dense_code(
    pages: dict[int, LatentPage], truth: SimpleNamespace
) -> None:
    n = int(truth.counts.sum())
    for latent, page in pages.items():
        f = truth.f[:, :, latent][truth.counts]
        active = f[f != 0]
        assert page.n_tokens == n
        assert page.frequency == len(active) / n
        assert sum(count for *_, count in page.histogram) == len(active)
        if len(active) == 0:
            assert (page.largest, page.mean, page.histogram) == (0.0, 0.0, ())
            continue
        # The sparse encoder adds the bias in another order than the dense one: float32 rounding.
        assert page.largest == pytest.approx(float(active.max()), rel=1e-5)
        assert page.mean == pytest.approx(float(active.double().mean()), rel=1e-5)
        for low, high, count in page.histogram:
            assert high == pytest.approx(low * 2**0.25)
            inside = int(((active > low * 1.0001) & (active < high * 0.9999)).sum())
            within = int(((active > low * 0.9999) & (active < high * 1.0001)).sum())
            assert inside <= count <= within
    assert pages[7].frequency == 0


def test_the_top_is_the_largest_of_each_context(
    pages: dict[int, LatentPage], truth: SimpleNamespace, documents: Tokens
) -> None:
    for latent, page in pages.items():
        f = truth.f[:, :, latent].nan_to_num(0)
        best, position = f.max(1)
        order = best.argsort(descending=True)[:6]
        order = order[best[order] > 0]
        found = [(e.context, e.position) for e in page.bands["top"]]
        assert found == [(int(c), int(position[c])) for c in order]
        for example in page.bands["top"]:
            assert example.document == documents.names[example.context // 3]
            exact = float(f[example.context, example.position])
            assert example.activation == pytest.approx(exact, rel=1e-5)


def test_an_example_carries_the_text_and_activations_around_it(
    pages: dict[int, LatentPage], truth: SimpleNamespace, documents: Tokens, tiny_model: Any
) -> None:
    seen = 0
    for latent, page in pages.items():
        for example in (e for band in page.bands.values() for e in band):
            start = max(0, example.position - 20)
            stop = min(documents.tokens.shape[1], example.position + 9)
            ids = documents.tokens[example.context, start:stop].tolist()
            assert list(example.tokens) == [tiny_model.tokenizer.decode([i]) for i in ids]
            assert example.peak == example.position - start
            exact = truth.f[example.context, start:stop, latent].tolist()
            # NaN equals NaN here: skipped, special and last positions are not measured.
            assert list(example.activations) == pytest.approx(exact, rel=1e-5, nan_ok=True)
            seen += 1
    assert seen > 100


def test_bands_hold_activations_of_their_quantiles_one_a_context(
    pages: dict[int, LatentPage], truth: SimpleNamespace
) -> None:
    checked = 0
    for latent, page in pages.items():
        f = truth.f[:, :, latent][truth.counts]
        active = f[f != 0].sort().values
        # Up to 64 active tokens the sample is all of them, so that quantiles are exact.
        for band, (low, high) in {"75 to 90 %": (0.75, 0.9), "median": (0.45, 0.55)}.items():
            some = page.bands[band]
            assert len({e.context for e in some}) == len(some) <= 5
            if not 10 <= len(active) <= 64:
                continue
            first = float(active[math.floor(low * len(active))])
            last = float(active[math.ceil(high * len(active)) - 1])
            assert some
            for e in some:
                assert first * 0.9999 <= e.activation <= last * 1.0001
                checked += 1
    assert checked > 20


def test_directions_against_covariances_of_the_parts_of_the_error(
    pages: dict[int, LatentPage], truth: SimpleNamespace, sae: Any, error_map: LinearMap
) -> None:
    linear = error_map(truth.x)
    for name, part in (
        ("linear", linear),
        ("nonlinear", truth.error - linear),
        ("activation", truth.x),
    ):
        covariance = part.T.cov()
        for latent, page in pages.items():
            u = sae.W_dec[latent].double()
            if latent == 7:
                assert getattr(page, name) == 0
                continue
            u = u / u.norm()
            expected = D_MODEL * float(u @ covariance @ u / covariance.trace())
            # Codes, map and projections are float32.
            assert getattr(page, name) == pytest.approx(expected, rel=1e-4)


def test_logits_and_neighbours_by_hand(
    pages: dict[int, LatentPage], sae: Any, tiny_model: Any
) -> None:
    directions = sae.W_dec.double()
    units = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-30)
    embedding = tiny_model.network.get_input_embeddings().weight.double()
    decode = tiny_model.tokenizer.decode
    for latent, page in pages.items():
        if latent == 7:
            assert page.neighbours == ()
            continue
        logits = embedding @ units[latent]
        logits -= logits.mean()
        for ends, largest in ((page.raised, True), (page.lowered, False)):
            values, ids = logits.topk(10, largest=largest)
            assert ends is not None
            assert [token for token, _ in ends] == [decode([i]) for i in ids.tolist()]
            assert [value for _, value in ends] == pytest.approx(values.tolist(), rel=1e-4)
        cosines = units @ units[latent]
        cosines[latent] = -2
        cosines[7] = -2
        values, ids = cosines.topk(8)
        assert [j for j, _ in page.neighbours] == ids.tolist()
        assert [c for _, c in page.neighbours] == pytest.approx(values.tolist(), abs=1e-5)


def test_heads_write_through_their_output_matrix(model: Any) -> None:
    units = torch.randn(70, D_MODEL)
    matrix = dict(model.network.state_dict())
    name = next(
        key for key in matrix if re.search(r"h\.1\..*c_proj\.weight", key) and "attn" in key
    )
    found = residual_directions(model, "blocks.1.attn.hook_z", units)
    # A difference of two residual streams of size 10 in float32.
    assert found is not None
    torch.testing.assert_close(found, units @ matrix[name].float(), rtol=1e-3, atol=1e-4)
    assert residual_directions(model, "blocks.1.hook_mlp_out", units) is units


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_model(write_model(tmp_path_factory.mktemp("gemma"), "gemma2"))


def test_a_norm_after_the_heads_leaves_no_logits(gemma: Any) -> None:
    assert residual_directions(gemma, "blocks.1.attn.hook_z", torch.randn(3, 48)) is None


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_z", "blocks.2.hook_mlp_out"])
@pytest.mark.parametrize("kind", ["topk", "normalised"])
def test_other_hooks_and_decoders(
    tiny_model: Any, documents: Tokens, tiny_saes: dict[str, Any], hook: str, kind: str
) -> None:
    other = copy.deepcopy(tiny_saes[kind])
    other.cfg.metadata.hook_name = hook
    counts = documents.tokens != 0
    counts[:, :SKIP], counts[:, -1] = False, False
    f = other.encode(tiny_model.activations(documents.tokens, hook)[counts])
    latent = int((f != 0).sum(0).argmax())
    page = latent_page(tiny_model, other, documents, latent, SKIP, 2)
    assert page.hook == hook
    assert len(page.bands["top"]) == 2
    assert page.frequency == pytest.approx(float((f[:, latent] != 0).double().mean()), abs=0.005)
    # Dense and sparse encoders round differently.
    assert page.largest == pytest.approx(float(f[:, latent].max()), rel=1e-4)
    assert page.raised is not None
    assert page.neuronpedia is None
    assert page.linear is None


def test_what_is_kept_does_not_depend_on_the_batches() -> None:
    """Events of ten latents in forty contexts, added in one batch, and context by context."""
    generator = torch.Generator().manual_seed(7)
    length, contexts, k = 12, 40, 3
    tokens = Tokens(torch.ones(contexts, length, dtype=torch.int64), torch.zeros(contexts).long(),
                    ("a",))  # fmt: skip
    indices = torch.rand(contexts * length, 10, generator=generator).argsort(1)[:, :k]
    values = torch.rand(contexts * length, k, generator=generator)
    values[values < 0.2] = 0
    chosen = torch.tensor([1, 4, 9])
    gathered = []
    for size in (contexts, 1, 7):
        one = _Gathered(chosen, tokens, 10, 4)
        for start in range(0, contexts, size):
            rows = torch.arange(start * length, min(start + size, contexts) * length)
            zero = torch.zeros_like(rows)
            batch = Batch(
                x=torch.zeros(len(rows), 1),
                token=zero,
                position=rows % length,
                document=zero,
                context=rows // length,
                loss=zero.float(),
            )
            one.add(batch, values[rows], indices[rows])
        gathered.append(one)
    for other in gathered[1:]:
        for name in ("count", "histogram"):
            assert torch.equal(getattr(gathered[0], name), getattr(other, name))
        for best, again in ((gathered[0].top, other.top), (gathered[0].sample, other.sample)):
            for name in ("key", "place", "value", "around"):
                assert torch.equal(getattr(best, name), getattr(again, name))


def test_the_lottery_is_even_and_its_neighbours_unlike() -> None:
    place = torch.arange(20_000)
    drawn = torch.stack([_lottery(torch.full_like(place, row), place) for row in range(3)])
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    counts = torch.histc(drawn[0], 20, 0, 1)
    # Of 1000 in a bin, five standard deviations are 154.
    assert float((counts - 1000).abs().max()) < 154
    # Correlations of 20,000 independent draws have a standard deviation of 0.007.
    assert float((drawn.corrcoef() - torch.eye(3)).abs().max()) < 0.035
    assert abs(float(torch.stack([drawn[0, 1:], drawn[0, :-1]]).corrcoef()[0, 1])) < 0.035


def test_without_a_list_living_latents_over_all_frequencies_are_chosen(
    tiny_model: Any, documents: Tokens, sae: Any
) -> None:
    found = latent_pages(tiny_model, sae, documents, None, SKIP, 1)
    frequencies = [page.frequency for page in found.values()]
    assert len(found) == 64
    assert 7 not in found
    assert frequencies == sorted(frequencies, reverse=True)
    assert min(frequencies) > 0


@pytest.fixture(scope="module")
def written(
    tiny_model: Any,
    documents: Tokens,
    sae: Any,
    error_map: LinearMap,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "new"
    return write_latents(tiny_model, sae, documents, folder, [3, 7, 12], SKIP, 4, error_map)


def only_asked_for(fold: Tag, soup: BeautifulSoup, address: str) -> None:
    """A closed fold whose frame has no address of its own: only its link puts one there."""
    assert "open" not in fold.attrs
    assert {one.name for one in fold.find_all(True)} == {"summary", "p", "a", "iframe"}
    assert "Without a network" in fold.text
    assert fold.a["href"] == address + "?embed=true"
    assert fold.a["target"] == fold.iframe["name"]
    assert set(fold.iframe.attrs) == {"name", "title", "referrerpolicy", "sandbox"}
    # The framed page may not send the reader's page elsewhere.
    assert "allow-top-navigation" not in str(fold.iframe["sandbox"])
    policy = soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    assert policy.endswith("; frame-src https://www.neuronpedia.org https://neuronpedia.org")


def test_the_files_are_linked_escaped_and_need_nothing_else(written: Path) -> None:
    folder = written.parent
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.html", "latent-3.html", "latent-7.html", "latent-12.html"}
    for path in folder.iterdir():
        soup = BeautifulSoup(path.read_text(), "html.parser")
        if path != written:
            address = f"https://www.neuronpedia.org/tiny/1-res/{path.stem.removeprefix('latent-')}"
            only_asked_for(soup.details.extract(), soup, address)
        links = [link["href"] for link in soup.find_all("a")]
        for href in links:
            assert href in names or href == (
                "https://www.neuronpedia.org/tiny/1-res/" + path.stem.removeprefix("latent-")
            )
        for link in soup.find_all("a"):
            del link["href"]
        self_contained(soup)
        assert "<doc>" not in path.read_text()
    rows = BeautifulSoup(written.read_text(), "html.parser").select("tbody tr")
    assert [row.a["href"] for row in rows] == ["latent-3.html", "latent-7.html", "latent-12.html"]
    first = BeautifulSoup((folder / "latent-3.html").read_text(), "html.parser")
    assert "<doc> & " in first.select_one(".examples .from").text
    assert first.select_one(".examples b")["class"]
    assert first.find("svg")["aria-label"]
    assert [a["href"] for a in first.nav.find_all("a")] == ["index.html", "latent-7.html"]
    dead = BeautifulSoup((folder / "latent-7.html").read_text(), "html.parser")
    assert "not active on any" in dead.text
    assert not dead.find("svg")


def test_pages_are_the_same_twice_and_old_ones_go(
    written: Path,
    tiny_model: Any,
    documents: Tokens,
    sae: Any,
    error_map: LinearMap,
    tmp_path: Path,
) -> None:
    (tmp_path / "latent-99.html").write_text("old")
    write_latents(tiny_model, sae, documents, tmp_path, [3, 7, 12], SKIP, 4, error_map)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in written.parent.iterdir()
    }


def test_a_page_shows_itself_in_a_notebook(pages: dict[int, LatentPage]) -> None:
    shown = pages[3]._repr_html_()
    soup = BeautifulSoup(shown, "html.parser")
    assert soup.h1.text == "Latent 3"
    # Other pages are not there to be linked.
    assert not soup.select('a[href^="latent-"]')


def test_a_latent_that_neuronpedia_does_not_host_has_no_frame(
    pages: dict[int, LatentPage],
) -> None:
    (content,) = _latent_html.pages({3: replace(pages[3], neuronpedia=None)}).values()
    assert not re.search("neuronpedia|<iframe|frame-src", content)


@pytest.mark.parametrize("identity", ["../x/y", "a b/c", "https://evil", "plain", 5])
def test_only_an_id_of_neuronpedia_becomes_a_link(
    tiny_model: Any, documents: Tokens, sae: Any, identity: object
) -> None:
    other = copy.deepcopy(sae)
    other.cfg.metadata.neuronpedia_id = identity
    first = documents.select(torch.arange(2))
    assert latent_page(tiny_model, other, first, 3, SKIP, 1).neuronpedia is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": []}, "expected some of 0 to 95"),
        ({"latents": [96]}, "expected some of 0 to 95"),
        ({"latents": [-1]}, "expected some of 0 to 95"),
        ({"contexts": 0}, "contexts is 0"),
        ({"skip": 31}, "skip is 31"),
        (
            {"error_map": LinearMap(torch.zeros(3, 3).double(), torch.zeros(3).double(), 0.0, 9)},
            r"The error map is \[3, 3\]",
        ),
    ],
)
def test_refuses(
    tiny_model: Any,
    documents: Tokens,
    sae: Any,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    arguments: dict[str, Any] = {"latents": [1], "skip": SKIP, **change}
    with pytest.raises(Refusal, match=message):
        write_latents(tiny_model, sae, documents, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_refuses_a_folder_of_other_things(
    tiny_model: Any, documents: Tokens, sae: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Refusal, match="has other things in it, such as mine"):
        write_latents(tiny_model, sae, documents, tmp_path, [1], SKIP)
    with pytest.raises(Refusal, match="is a file, expected a folder"):
        write_latents(tiny_model, sae, documents, tmp_path / "mine.txt", [1], SKIP)
