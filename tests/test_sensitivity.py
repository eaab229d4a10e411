"""Paths, curves and their scalars: by hand, by a naive loop over full forwards, and by scipy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import ks_2samp
from torch import Tensor

from darkmatter import sensitivity
from darkmatter.models import Model, open_model
from darkmatter.sensitivity import (
    absolute_path,
    area_ratio_step,
    covariance_matched,
    curves,
    end_of_linearity,
    isotropic,
    kl_divergence,
    ks_distance,
    ks_interval,
    max_slope,
    max_slope_step,
    mean_distance,
    plane,
    plateau_length,
    relative_curve,
    relative_path,
    root_js,
    rotation_path,
)
from tests.common import normal, refused
from tests.conftest import N_LAYER, write_model

FINAL = f"blocks.{N_LAYER - 1}.hook_resid_post"
# Curves of float32 activations of order 10 through three blocks, computed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def some_paths(model: Model, tokens: Tensor, hook: str, n: int = 6) -> Tensor:
    """[b, 2, n + 1, d]: from each prompt's own activation to the next prompt's, and to noise."""
    base = model.activations(tokens, hook)[:, -1]
    noise = base + torch.randn(base.shape, generator=torch.Generator().manual_seed(5))
    return torch.stack([relative_path(base, base.roll(1, 0), n), relative_path(base, noise, n)], 1)


def naive(model: Model, hook: str, tokens: Tensor, paths: Tensor) -> dict[str, Tensor]:
    """One full forward a point, and the definitions."""
    found = {name: torch.zeros(paths.shape[:3]) for name in ("l2", "kl", "root_js")}
    for i, j in torch.cartesian_prod(torch.arange(paths.shape[0]), torch.arange(paths.shape[1])):
        answers: list[tuple[Tensor, Tensor]] = []
        for x in paths[i, j]:

            def put(whole: Tensor, x: Tensor = x) -> Tensor:
                whole[:, -1] = x
                return whole

            read: list[Tensor] = []

            def keep(whole: Tensor, read: list[Tensor] = read) -> Tensor:
                read.append(whole[0, -1])
                return whole

            logits = model.logits(tokens[i : i + 1], {hook: put, FINAL: keep})
            answers.append((read[0], logits[0, -1].double().softmax(-1)))
        for n, (resid, p) in enumerate(answers):
            resid_0, p_0 = answers[0]
            found["l2"][i, j, n] = (resid - resid_0).norm()
            found["kl"][i, j, n] = (p_0 * (p_0 / p).log()).sum()
            found["root_js"][i, j, n] = jensenshannon(p_0, p, base=2)
    return found


# ---- curves of a model


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"])
def test_cached_curves_are_those_of_one_full_forward_a_point(
    model: Model, tiny_tokens: Tensor, hook: str
) -> None:
    tokens = tiny_tokens[:3, :9]
    paths = some_paths(model, tokens, hook)
    expected = naive(model, hook, tokens, paths)
    assert model.last_position(tokens, hook, [FINAL]).cached
    for cached in (True, False):
        found = curves(model, hook, tokens, paths, read=("l2", "kl", "root_js"), cached=cached)
        torch.testing.assert_close(found["l2"], expected["l2"], **CLOSE)
        torch.testing.assert_close(found["kl"], expected["kl"], **CLOSE)
        # The root makes 1e-10 of a divergence 1e-5, so small values keep half of the digits.
        torch.testing.assert_close(found["root_js"], expected["root_js"], rtol=1e-3, atol=1e-3)
        assert all(bool((curve[..., 0] == 0).all()) for curve in found.values())
    # The control: the points do move the end.
    assert float(expected["l2"][..., -1].min()) > 0.1


def test_curves_at_other_hooks_and_from_other_hooks(model: Model, tiny_tokens: Tensor) -> None:
    tokens = tiny_tokens[:2, :7]
    for hook in ("blocks.0.hook_resid_post", "blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out"):
        paths = some_paths(model, tokens, hook)
        read = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "l2")
        fast = curves(model, hook, tokens, paths, read)
        slow = curves(model, hook, tokens, paths, read, cached=False)
        for name in read:
            torch.testing.assert_close(fast[name], slow[name], **CLOSE)
        same = fast["blocks.1.hook_resid_post"], fast["blocks.2.hook_resid_pre"]
        torch.testing.assert_close(*same, **CLOSE)
        assert model.last_position(tokens, hook).cached == hook.endswith("resid_post")


def test_after_the_last_block_only_the_readout_is_left(model: Model, tiny_tokens: Tensor) -> None:
    tokens = tiny_tokens[:2, :9]
    paths = some_paths(model, tokens, FINAL)
    fast = curves(model, FINAL, tokens, paths, ("kl",))["kl"]
    slow = curves(model, FINAL, tokens, paths, ("kl",), cached=False)["kl"]
    torch.testing.assert_close(fast, slow, **CLOSE)
    assert model.last_position(tokens, FINAL).cached


def test_pieces_do_not_matter(
    model: Model, tiny_tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tiny_tokens[:3, :9]
    paths = some_paths(model, tokens, "blocks.1.hook_resid_pre")
    whole = curves(model, "blocks.1.hook_resid_pre", tokens, paths, ("l2", "kl"))
    for rows in (1, 4, 13):
        monkeypatch.setattr(sensitivity, "_ROWS_AT_A_TIME", rows)
        pieces = curves(model, "blocks.1.hook_resid_pre", tokens, paths, ("l2", "kl"))
        for name in whole:
            torch.testing.assert_close(pieces[name], whole[name], **CLOSE)


def test_only_the_last_position_is_run(tiny_model_folder: Path, tiny_tokens: Tensor) -> None:
    model = open_model(tiny_model_folder, backend="nnsight", check=False)
    tokens, hook = tiny_tokens[:2, :10], "blocks.1.hook_resid_pre"
    paths = some_paths(model, tokens, hook)
    shapes: list[tuple[int, int]] = []
    blocks: Any = model.underlying._module.transformer.h
    blocks[2].mlp.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[:2])))
    curves(model, hook, tokens, paths)
    # The other positions once; whether blocks give tuples; one row twice for the check; the bases
    # of two paths of two prompts; then the points.
    assert shapes == [(2, 9), (1, 1), (1, 1), (1, 10), (4, 1), (24, 1)]


def test_prompts_of_one_token(model: Model, tiny_tokens: Tensor) -> None:
    tokens, hook = tiny_tokens[:2, 3:4], "blocks.1.hook_resid_pre"
    paths = some_paths(model, tokens, hook)
    fast = curves(model, hook, tokens, paths)["l2"]
    torch.testing.assert_close(fast, curves(model, hook, tokens, paths, cached=False)["l2"])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_other_decoders(tmp_path: Path, kind: str, tiny_tokens: Tensor) -> None:
    model = open_model(write_model(tmp_path, kind), check=False)
    tokens, hook = tiny_tokens[:2, :10], "blocks.1.hook_resid_pre"
    paths = some_paths(model, tokens, hook)
    fast = curves(model, hook, tokens, paths, ("l2", "kl"))
    slow = curves(model, hook, tokens, paths, ("l2", "kl"), cached=False)
    for name in fast:
        # Weights of these are larger, so curves are of order 100.
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-4, atol=1e-4)


def test_a_model_whose_cache_is_wrong_runs_whole_prompts(
    tiny_model_folder: Path, tiny_tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(tiny_model_folder)
    tokens, hook = tiny_tokens[:2, :10], "blocks.1.hook_resid_pre"
    paths = some_paths(model, tokens, hook)
    expected = curves(model, hook, tokens, paths, cached=False)["l2"]
    from transformers import DynamicCache

    # Every prompt gets the keys and values of the other.
    right = DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda s, i: right(s, 1 - i))
    assert not model.last_position(tokens, hook, [FINAL]).cached
    torch.testing.assert_close(curves(model, hook, tokens, paths)["l2"], expected)


def test_refusals_of_curves(unchecked: None, tiny_model: Model, tiny_tokens: Tensor) -> None:
    tokens, hook = tiny_tokens[:2, :10], "blocks.1.hook_resid_pre"
    paths = some_paths(tiny_model, tokens, hook)
    with pytest.raises(ValueError, match=r"for 2 prompts, expected \[prompts, paths, points, 32\]"):
        curves(tiny_model, hook, tokens, paths[:1])
    with pytest.raises(ValueError, match="2 points or more"):
        curves(tiny_model, hook, tokens, paths[:, :, :1])
    with pytest.raises(ValueError, match="Nothing is to be read"):
        curves(tiny_model, hook, tokens, paths, read=())
    with pytest.raises(ValueError, match="has no hook 'cosine'"):
        curves(tiny_model, hook, tokens, paths, read=("cosine",))
    with pytest.raises(ValueError, match="cannot be read when"):
        curves(tiny_model, hook, tokens, paths, read=("blocks.0.hook_resid_post",))
    paths[1, 0, 2] = torch.nan
    with pytest.raises(ValueError, match=r"\[prompt, path, point\] \[1, 0, 2\]"):
        curves(tiny_model, hook, tokens, paths)
    with pytest.raises(ValueError, match="for 2 prompts, expected one row of 32"):
        tiny_model.last_position(tokens, hook)(torch.zeros(3, 32), torch.tensor([0, 1]))


# ---- paths


def test_absolute_steps_by_hand() -> None:
    base, target = torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0, 5.0]])
    path = absolute_path(base, target, step=0.5, n=2)
    # The direction is (3, 4) / 5.
    torch.testing.assert_close(path, torch.tensor([[[1.0, 1.0], [1.3, 1.4], [1.6, 1.8]]]))
    # By default a hundred steps go as far as the targets are on average.
    bases, targets = normal(0, 20, 8), normal(1, 20, 8)
    far = (absolute_path(bases, targets)[:, -1] - bases).norm(dim=1)
    expected = torch.full_like(far, mean_distance(bases, targets))
    torch.testing.assert_close(far, expected)


def test_relative_steps_by_hand() -> None:
    base, target = torch.tensor([0.0, 8.0]), torch.tensor([4.0, 0.0])
    path = relative_path(base, target, n=4)
    expected = torch.tensor([[0.0, 8.0], [1.0, 6.0], [2.0, 4.0], [3.0, 2.0], [4.0, 0.0]])
    assert torch.equal(path, expected)


def test_rotation_by_hand() -> None:
    base, target = torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 7.0]])
    path = rotation_path(base, target, n=2)[0]
    # A half turn by way of the side on which the target is; the norm stays 2.
    expected = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]])
    torch.testing.assert_close(path, expected, rtol=0, atol=1e-6)
    quarter = rotation_path(base, target, n=1, angle=math.pi / 2)[0, -1]
    torch.testing.assert_close(quarter, torch.tensor([0.0, 2.0]), rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), n=st.integers(1, 30), d=st.integers(2, 12))
def test_what_holds_of_every_path(seed: int, n: int, d: int) -> None:
    base, target = normal(seed, 3, d), normal(seed + 1, 3, d)
    straight, turned = relative_path(base, target, n), rotation_path(base, target, n)
    even = absolute_path(base, target, 0.25, n)
    for path in (straight, turned, even):
        assert path.shape == (3, n + 1, d)
        assert torch.equal(path[:, 0], base)
    torch.testing.assert_close(straight[:, -1], target)
    torch.testing.assert_close(turned.norm(dim=-1), base.norm(dim=-1)[:, None].expand(3, n + 1))
    torch.testing.assert_close(turned[:, -1], -base)
    steps = even.diff(dim=1).norm(dim=-1)
    torch.testing.assert_close(steps, torch.full_like(steps, 0.25))


def test_plane_by_hand() -> None:
    a, b, c = (
        torch.tensor([0.0, 0.0, 1.0]),
        torch.tensor([2.0, 0.0, 1.0]),
        torch.tensor([1.0, 3, 1]),
    )
    found = plane(a, b, c, torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 1.0]))
    assert torch.equal(found[0, 0], a)
    assert torch.equal(found[2, 0], b)
    # C stands over the middle of AB.
    assert torch.equal(found[1, 1], c)
    assert torch.equal(found[0, 1], torch.tensor([0.0, 3.0, 1.0]))


def test_refusals_of_paths() -> None:
    a, b = torch.ones(2, 3), torch.zeros(2, 3)
    with refused("base is .* expected a target for every base"):
        relative_path(a, b[:1])
    with refused("n is 0"):
        relative_path(a, b, n=0)
    with refused("step is -1"):
        absolute_path(a, b, step=-1)
    with refused("equal to their base"):
        absolute_path(a, torch.stack([a[0], b[0]]), step=1)
    with refused("on average"):
        absolute_path(a, a)
    with refused("parallel"):
        rotation_path(a, 3 * a)
    one = torch.ones(1)
    with refused("on a line"):
        plane(a[0], b[0], 0.5 * a[0], one, one)
    with refused("on a line"):
        plane(a[0], a[0], b[0], one, one)


# ---- targets


def test_covariance_matched_has_the_mean_and_covariance() -> None:
    x = normal(0, 300, 4) @ normal(1, 4, 4) + 5
    drawn = covariance_matched(x, 200_000, torch.Generator().manual_seed(2))
    size = float(torch.cov(x.T).diagonal().max())
    # 200,000 draws: the error of a variance is sqrt(2 / n) = 0.3 % of it; five times that.
    assert float((torch.cov(drawn.T) - torch.cov(x.T)).abs().max()) < 0.016 * size
    assert float((drawn.mean(0) - x.mean(0)).abs().max()) < 5 * math.sqrt(size / 200_000)
    # Fewer rows than dimensions: draws stay in the span of the rows.
    few = normal(3, 3, 6)
    span = torch.cat([few - few.mean(0), covariance_matched(few, 10) - few.mean(0)])
    assert int(torch.linalg.matrix_rank(span, rtol=1e-9)) == 2
    with refused("2 rows or more"):
        covariance_matched(x[:1], 3)


def test_isotropic_has_the_distance_and_no_preferred_direction() -> None:
    base = normal(0, 20_000, 5)
    away = isotropic(base, torch.full((20_000,), 3.0).double()) - base
    torch.testing.assert_close(away.norm(dim=1), torch.full((20_000,), 3.0).double())
    # Each direction has 9 / 5 of the squared length, known to about 1 %.
    second = away.T @ away / len(away)
    assert float((second - 1.8 * torch.eye(5)).abs().max()) < 0.08


# ---- distances of distributions


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_divergences_are_scipys(seed: int) -> None:
    log_p, log_q = ((3 * normal(seed + i, 4, 9)).log_softmax(-1) for i in range(2))
    p, q = log_p.exp(), log_q.exp()
    torch.testing.assert_close(kl_divergence(log_p, log_q), (p * (p / q).log()).sum(-1))
    expected = torch.tensor([jensenshannon(a, b, base=2) for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(root_js(log_p, log_q), expected)
    torch.testing.assert_close(root_js(log_p, log_q), root_js(log_q, log_p))


def test_root_js_ends_at_one() -> None:
    log_p = torch.tensor([0.0, -200.0]).log_softmax(-1)
    assert float(root_js(log_p, log_p.flip(0))) == 1.0
    assert float(root_js(log_p, log_p)) == 0.0


# ---- scalars of curves that are known by hand

STRAIGHT = torch.arange(101.0)
QUADRATIC = torch.arange(101.0).square()
STEP = torch.where(torch.arange(101) >= 40, 240.0, 0.0)
# Flat at 1 a step until 30, then 20 a step until 42, then flat.
RAMP = torch.cat([torch.arange(31.0), 30 + 20 * torch.arange(1.0, 13.0), torch.full((58,), 270.0)])
CONSTANT = torch.zeros(101)


def test_max_slope_step_by_hand() -> None:
    assert max_slope_step(STEP).item() == 40
    assert max_slope_step(RAMP).item() == 31
    assert max_slope_step(QUADRATIC).item() == 100
    # Every step is as steep; the first slope stands for step 0 too.
    assert max_slope_step(STRAIGHT).item() == 0
    assert max_slope_step(CONSTANT).item() == 100
    # The published floor: slopes of 0.01 do not count, of 0.03 do.
    assert max_slope_step(0.01 * STRAIGHT, floor=0.02).item() == 100
    assert max_slope_step(0.03 * QUADRATIC, floor=0.02).item() == 100
    assert max_slope_step(0.03 * STEP, floor=0.02).item() == 40


def test_end_of_linearity_by_hand() -> None:
    # The line is 9 n; n^2 is over 1.2 of it from 10.8 on, so step 11 is off and 10 the last.
    assert end_of_linearity(QUADRATIC).item() == 10
    # 30 + 20 at step 31 against 31.
    assert end_of_linearity(RAMP).item() == 30
    assert end_of_linearity(STRAIGHT).item() == 100
    assert end_of_linearity(CONSTANT).item() == 100
    # The line through a flat start is 0: any distance is off it.
    assert end_of_linearity(STEP).item() == 39
    # The draft's tenth: n^2 > 1.1 * 9 n from 9.9 on.
    assert end_of_linearity(QUADRATIC, tolerance=0.1).item() == 9
    # A line through another step: 4 n, left at 4.8.
    assert end_of_linearity(QUADRATIC, at=4).item() == 4
    with refused("The line goes through step 9 of curves with 10 points"):
        end_of_linearity(STRAIGHT[:10])


def test_area_ratio_step_by_hand() -> None:
    # At the jump the triangle is 40 * 240 / 2 and the area 240 / 2; later the area grows faster.
    assert area_ratio_step(STEP).item() == 40
    # 37 * 170 / 2 = 3145 over 450 + 700; one step less is 2700 / 990, one more 3610 / 1330.
    assert area_ratio_step(RAMP).item() == 37
    # 1 everywhere, so the first step that counts.
    assert area_ratio_step(STRAIGHT).item() == 5
    assert area_ratio_step(0.1 * STRAIGHT, first=7).item() == 7
    # i^3 / 2 over the trapezia i^3 / 3 + i / 6 grows with i.
    assert area_ratio_step(QUADRATIC).item() == 100
    assert area_ratio_step(CONSTANT).item() == 100
    with refused("compared from 101 on"):
        area_ratio_step(STRAIGHT, first=101)


def test_the_published_area_ratio_is_the_authors_loop() -> None:
    noisy = (RAMP + 0.5 * normal(0, 101).abs().cumsum(0).float()).double()
    for curve in (QUADRATIC.double(), noisy):
        ratios = [
            float(curve[i]) * i / 2 / float(torch.trapezoid(curve[:i])) for i in range(5, 101)
        ]
        expected = 5 + ratios.index(max(ratios))
        assert area_ratio_step(curve, published=True).item() == expected
    # What the missing trapezium does: a straight line is i / (i - 1) and a parabola ends early.
    assert area_ratio_step(QUADRATIC, published=True).item() == 5
    assert area_ratio_step(STEP, published=True).item() == 40


def test_plateau_length_by_hand() -> None:
    assert plateau_length(STEP, 20).item() == 40
    assert plateau_length(RAMP, 20).item() == 20
    assert plateau_length(STRAIGHT, 20.5).item() == 21
    assert plateau_length(QUADRATIC, 20).item() == 5
    assert plateau_length(CONSTANT, 20).item() == 100
    with refused("threshold is 0"):
        plateau_length(STEP, 0)


def test_max_slope_by_hand() -> None:
    assert max_slope(STRAIGHT).item() == pytest.approx(1)
    assert max_slope(STEP).item() == 100
    # 20 of 270 in a hundredth of the path.
    assert max_slope(RAMP).item() == pytest.approx(20 / 270 * 100)
    # (100^2 - 99^2) / 100^2 in a hundredth.
    assert max_slope(QUADRATIC).item() == pytest.approx(1.99)
    assert torch.equal(relative_curve(STEP), STEP / 240)
    with refused("1 curves end at distance 0"):
        max_slope(torch.stack([STEP, CONSTANT]))


def test_scalars_keep_the_axes_in_front() -> None:
    many = torch.stack([STEP, RAMP, STRAIGHT, QUADRATIC]).reshape(2, 2, 101)
    for scalar in (max_slope_step, end_of_linearity, area_ratio_step, max_slope):
        expected = [scalar(curve) for curve in (STEP, RAMP, STRAIGHT, QUADRATIC)]
        assert torch.equal(scalar(many), torch.stack(expected).reshape(2, 2))
    with refused("1 values of which are not finite"):
        max_slope_step(torch.tensor([0.0, torch.nan]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.01, 100))
def test_scalars_have_no_unit(seed: int, scale: float) -> None:
    curve = normal(seed, 101).square().cumsum(0)
    curve -= curve[0].clone()
    for scalar in (max_slope_step, end_of_linearity, area_ratio_step):
        assert torch.equal(scalar(scale * curve), scalar(curve))
    assert max_slope(scale * curve).item() == pytest.approx(max_slope(curve).item())
    assert 1 - 1e-9 <= max_slope(curve).item() <= 100


# ---- Kolmogorov and Smirnov


# Of one value scipy cannot give a probability, and warns; only the distance is asked for.
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), n=st.integers(1, 40), m=st.integers(1, 40))
def test_ks_is_scipys(seed: int, n: int, m: int) -> None:
    # Rounded, so that there are ties within and between the samples.
    a, b = (3 * normal(seed, n)).round(), (3 * normal(seed + 1, m)).round() + 1
    assert ks_distance(a, b) == pytest.approx(float(ks_2samp(a, b, method="asymp").statistic))


def test_ks_by_hand_and_its_interval() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3.0, 4.0, 5.0, 6.0])
    assert ks_distance(a, b) == 0.5
    assert ks_distance(a, a) == 0
    document = torch.arange(400)
    far = ks_interval(normal(0, 400), normal(1, 400) + 1, document)
    # P(z < 0.5) - P(z < -0.5) = 0.383; the error of 400 is about 0.03.
    assert far.low < 0.383 < far.high
    assert far.value == pytest.approx(ks_distance(normal(0, 400), normal(1, 400) + 1))
    assert far.high - far.low < 0.15
    # A hundred copies of four prompts are four prompts.
    copied = ks_interval(a.repeat(100), b.repeat(100), torch.arange(4).repeat(100))
    assert copied.high - copied.low > 0.3
    with refused("expected one of each for every prompt"):
        ks_interval(a, b[:3], document[:4])
    with refused("expected \\[n\\] finite numbers"):
        ks_distance(a, torch.tensor([torch.nan]))
