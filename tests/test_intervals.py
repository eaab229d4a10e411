"""intervals: against a loop that copies documents, and coverage on planted clusters."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from darkmatter import intervals
from darkmatter.intervals import (
    Interval,
    Resamples,
    bootstrap,
    document_sums,
    fvu_columns,
    fvu_from_totals,
    r2_columns,
    r2_from_totals,
)
from darkmatter.leastsquares import fvu, r2
from tests.common import normal, refused


def mean_from_totals(totals: Tensor) -> Tensor:
    return totals[:, 0] / totals[:, 1]


def with_count(values: Tensor) -> Tensor:
    return torch.stack([values, torch.ones_like(values)], dim=1)


class TestDocumentSums:
    def test_by_hand_in_order_of_the_documents(self) -> None:
        values = torch.tensor([[1.0, 10], [2, 20], [4, 40], [8, 80]])
        sums = document_sums(values, torch.tensor([7, -2, 7, 3]))
        # Documents -2, 3, 7.
        assert sums.tolist() == [[2, 20], [8, 80], [5, 50]]
        assert sums.dtype == torch.float64

    def test_refusals(self) -> None:
        values = torch.ones(3, 2)
        with refused(r"document is torch.int64 \[2\], expected integers \[3\]"):
            document_sums(values, torch.tensor([1, 2]))
        with refused("document is torch.float32"):
            document_sums(values, torch.ones(3))
        with refused("values holds NaN or infinity, first in row 1"):
            document_sums(torch.tensor([[0.0], [math.nan]]), torch.tensor([0, 1]))


class TestColumns:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 2**31 - 1))
    def test_totals_give_the_scores(self, seed: int) -> None:
        x, x_hat = normal(seed, 40, 3) + 4, normal(seed + 1, 40, 3) + 4
        # Differences of raw sums lose the two digits of mean^2 / variance.
        totals = fvu_columns(x, x_hat).sum(0, keepdim=True)
        assert float(fvu_from_totals(totals)) == pytest.approx(fvu(x, x_hat), rel=1e-11)
        totals = r2_columns(x, x_hat).sum(0, keepdim=True)
        for average in ("dims", "pooled"):
            expected = r2(x, x_hat, average)
            assert float(r2_from_totals(totals, average)) == pytest.approx(expected, rel=1e-11)

    def test_vectors_are_one_column(self) -> None:
        assert r2_columns(normal(0, 9), normal(1, 9)).shape == (9, 4)

    def test_refusals(self) -> None:
        x = normal(0, 9, 2)
        with refused(r"x is \[9, 2\] and x_hat is \[8, 2\]"):
            fvu_columns(x, x[1:])
        with refused("y_hat holds NaN or infinity, first in row 0"):
            r2_columns(x, x * math.nan)
        with refused('average is \'sum\', expected "dims" or "pooled"'):
            r2_from_totals(torch.ones(1, 4).double(), "sum")  # pyright: ignore[reportArgumentType]


class TestBootstrap:
    @pytest.mark.parametrize("draws_at_a_time", [4_000_000, 40])
    def test_against_a_loop_that_copies_documents(
        self, monkeypatch: pytest.MonkeyPatch, draws_at_a_time: int
    ) -> None:
        monkeypatch.setattr(intervals, "_DRAWS_AT_A_TIME", draws_at_a_time)
        generator = torch.Generator().manual_seed(0)
        document = torch.randint(12, (200,), generator=generator)
        x, x_hat = normal(1, 200, 3) + 1, normal(2, 200, 3)
        x = x + document[:, None]
        sums = document_sums(fvu_columns(x, x_hat), document)
        found = bootstrap(fvu_from_totals, sums, n=60, seed=5, level=0.9)

        drawn = np.random.default_rng(5).integers(12, size=(60, 12))
        scores = []
        for documents in drawn:
            tokens = torch.cat([(document == d).nonzero()[:, 0] for d in documents.tolist()])
            scores.append(fvu(x[tokens], x_hat[tokens]))
        low, high = np.quantile(scores, [0.05, 0.95])
        # The same resamples, scored token by token.
        assert found == pytest.approx((fvu(x, x_hat), low, high), rel=1e-9)

    def test_value_is_the_plain_score_and_seed_fixes_the_interval(self) -> None:
        y, y_hat = normal(0, 90, 2), normal(1, 90, 2)
        sums = document_sums(r2_columns(y, y_hat), torch.arange(90) // 6)
        for average in ("dims", "pooled"):
            statistic = partial(r2_from_totals, average=average)
            found = bootstrap(statistic, sums, seed=3)
            assert isinstance(found, Interval)
            assert found.value == pytest.approx(r2(y, y_hat, average), rel=1e-11)
            assert found.low < found.value < found.high
            assert found == bootstrap(statistic, sums, seed=3)
            assert found != bootstrap(statistic, sums, seed=4)

    def test_a_higher_level_is_wider_and_equal_documents_give_no_width(self) -> None:
        sums = with_count(normal(0, 30))
        narrow, wide = (bootstrap(mean_from_totals, sums, level=level) for level in (0.5, 0.99))
        assert wide.low < narrow.low < narrow.high < wide.high
        still = bootstrap(mean_from_totals, with_count(torch.full((5,), 2.0)))
        assert still == Interval(2.0, 2.0, 2.0)

    def test_covers_on_clustered_tokens_where_resampling_tokens_does_not(self) -> None:
        # 50 documents of 10 tokens; a token is its document's level plus noise, each of spread 1.
        # True spread of the mean: sqrt(1/50 + 1/500) = .148; taking tokens as independent it looks
        # like sqrt(2/500) = .063, and covers |z| < 1.96 * .063 / .148 = .84, that is 60 %.
        runs, documents, length = 200, 50, 10
        by_document, by_token = 0, 0
        for run in range(runs):
            tokens = normal(2 * run, documents, 1) + normal(2 * run + 1, documents, length)
            columns = with_count(tokens.flatten())
            document = torch.arange(documents).repeat_interleave(length)
            of_documents = bootstrap(mean_from_totals, document_sums(columns, document), 200, run)
            of_tokens = bootstrap(mean_from_totals, columns, 200, run)
            by_document += of_documents.low <= 0 <= of_documents.high
            by_token += of_tokens.low <= 0 <= of_tokens.high
        # Binomial standard error .015; the percentile interval of 50 documents itself covers 94 %.
        assert 0.89 <= by_document / runs <= 0.99
        assert by_token / runs <= 0.72

    def test_refusals(self) -> None:
        sums = torch.ones(4, 2, dtype=torch.float64)
        with refused(r"sums is \[1, 2\], expected \[documents, k\] with at least 2"):
            bootstrap(mean_from_totals, sums[:1])
        with refused("n=0 and level=0.95"):
            bootstrap(mean_from_totals, sums, n=0)
        with refused("n=1000 and level=1"):
            bootstrap(mean_from_totals, sums, level=1)
        with refused("sums holds NaN or infinity, first in row 0"):
            bootstrap(mean_from_totals, sums * math.nan)
        with refused(r"gave \[\] values"):
            bootstrap(torch.sum, sums)
        with refused("gave .* values of which 1001 are not finite"):
            bootstrap(lambda totals: totals[:, 0] / 0, sums)

    @pytest.mark.parametrize("constant", [0.0, 0.1])
    def test_scores_of_constants_are_refused(self, constant: float) -> None:
        y = normal(0, 40, 2)
        y[:, 1] = constant
        document = torch.arange(40) // 5
        with refused("are not finite"):
            bootstrap(r2_from_totals, document_sums(r2_columns(y, 0 * y), document))
        x = y[:, 1:]
        with refused("are not finite"):
            bootstrap(fvu_from_totals, document_sums(fvu_columns(x, x + 1), document))


class TestResamples:
    def test_blocks_of_documents_are_the_bootstrap_of_all(self) -> None:
        x = normal(3, 90, 4)
        document = torch.arange(90) // 6
        columns = fvu_columns(x, x + 0.3)
        expected = bootstrap(fvu_from_totals, document_sums(columns, document), n=200, seed=5)
        resamples = Resamples(15, 200, seed=5)
        # Blocks that cut the eighth document in two, the last block first.
        blocks = [
            (document[rows].unique(), document_sums(columns[rows], document[rows]))
            for rows in (slice(45, 90), slice(0, 45))
        ]
        found = resamples.interval(fvu_from_totals, resamples.totals(blocks))
        # Sums of 15 numbers in float64, in another order.
        assert found == pytest.approx(expected, rel=1e-13)

    def test_draws_do_not_depend_on_how_many_are_made_at_a_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights = Resamples(13, 60, seed=2).weights
        assert weights.sum(1).tolist() == [13] * 60
        monkeypatch.setattr(intervals, "_DRAWS_AT_A_TIME", 40)
        assert torch.equal(Resamples(13, 60, seed=2).weights, weights)

    def test_no_blocks_are_refused(self) -> None:
        with refused("There are no sums of documents"):
            Resamples(3, 5).totals([])
