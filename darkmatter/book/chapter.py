"""What a chapter calls: start it, record values, say them in prose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from darkmatter._refusal import Refusal
from darkmatter.book import figures, prose
from darkmatter.book.claims import RECORD_MIME, START_MIME, Claim, Interval, load_claims
from darkmatter.book.paths import find_claims
from darkmatter.book.relations import Value

_STAMPED = (
    "darkmatter-book",
    "torch",
    "numpy",
    "scipy",
    "transformers",
    "transformer-lens",
    "sae-lens",
    "nnsight",
    "matplotlib",
)


def start(chapter: str, suite: str, seed: int) -> Chapter:
    """Begin a chapter: seed torch, numpy and random, set the figure style, stamp the versions.

    `chapter` is its two digits, `suite` the name of the suite it runs on. The versions travel in
    the output's data, not on the page. Where claims.yml is not at hand (a notebook opened alone, as
    on Colab) values are recorded without being checked.
    """
    path = find_claims()
    begun = Chapter(chapter, suite, seed, load_claims(path) if path else None)
    _seed(seed)
    figures.use_house_style()
    _display(
        {
            START_MIME: {
                "chapter": chapter,
                "suite": suite,
                "seed": seed,
                "versions": versions(),
            },
            "text/plain": f"Chapter {chapter}, suite {suite}, seed {seed}",
        }
    )
    if begun.foreign:
        note = f"There is no expectation for suite {suite}: widths, L0s and findings that the text "
        note += "names are those of the suite it was written for; measured values are this one's."
        _display({"text/markdown": f"> {note}", "text/plain": note})
    return begun


class Chapter:
    """A running chapter: holds the values recorded so far and writes them into its prose.

    `claims` maps ids to claims; None where the ledger is not at hand.
    """

    def __init__(
        self, chapter: str, suite: str, seed: int, claims: Mapping[str, Claim] | None
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:  # pyright: ignore[reportUnnecessaryIsInstance] - notebooks are not type-checked
            raise Refusal(
                f"expected a seed that is a whole number of at least 0, found {seed!r}; "
                "pass the parameter: start(..., seed=seed)"
            )
        if claims is not None and chapter not in {claim.chapter for claim in claims.values()}:
            raise Refusal(
                f"expected a chapter with claims in claims.yml, found {chapter!r}; "
                "write its two digits, and its claims into book/claims.yml"
            )
        self.chapter = chapter
        self.suite = suite
        self.seed = seed
        self._claims = claims
        self._values: dict[str, tuple[Value, Interval | None]] = {}
        # A suite that no claim knows: widths differ and with them ids, and any value may come out.
        self.foreign = claims is not None and not any(suite in c.expect for c in claims.values())

    def record(self, id: str, value: object, interval: object = None) -> None:
        """Put a measured value under a claim, where the ledger, the check and the prose find it.

        `value` is a number, a truth value or a list of numbers (a tensor or array of these is
        taken too), kept to ten significant digits; `interval` is (low, high), anything whose last
        two elements are low and high (`darkmatter.intervals.Interval`), or for a list one such pair
        per element.

        On a suite for which the ledger expects nothing any id is taken, and a value that is not
        finite is shown, not recorded.

        Raises `Refusal` for an id that claims.yml does not give to this chapter, for a value that
        is not finite, an interval that does not fit, or an id recorded with another value.
        """
        if self.foreign:
            try:
                _plain_interval(id, _plain_value(id, value), interval)
            except Refusal as reason:
                _display({"text/plain": f"not recorded on suite {self.suite}: {reason}"})
                return
        self._check_id(id)
        plain = _plain_value(id, value)
        pair = _plain_interval(id, plain, interval)
        if id in self._values and self._values[id] != (plain, pair):
            raise Refusal(
                f"expected one value of {id}, found {self._values[id][0]} and now {plain}; "
                "record another id, or restart the chapter"
            )
        self._values[id] = (plain, pair)
        _display(
            {
                RECORD_MIME: {
                    "id": id,
                    "value": plain,
                    "interval": pair,
                    "suite": self.suite,
                    "seed": self.seed,
                    "chapter": self.chapter,
                },
                "text/plain": f"recorded {id} = {_shown(plain, pair)}",
            }
        )

    def say(self, text: str) -> None:
        """Show a Markdown sentence whose placeholders are filled with recorded values.

        `{id}` value with interval, `{id:plain}` without, `{id:%}` and `{id:plain%}` in per cent,
        `{id:paper}` the published value. This is the only way a measured number gets into prose.
        """
        filled = self.text(text)
        _display({"text/markdown": filled, "text/plain": filled})

    def text(self, text: str) -> str:
        """The same as `say`, as a string: for captions, titles and alternative texts.

        Raises `Refusal` for a typed decimal or percentage, an id that was not recorded, or a
        format that does not exist.
        """
        if typed := prose.typed_numbers(text):
            raise Refusal(
                f"expected measured numbers as placeholders, found {typed[0]!r} typed by hand; "
                "record it and write {id}"
            )
        return prose.fill(text, self._write)

    def _write(self, id: str, form: str) -> str:
        if form == "paper":
            self._check_id(id)
            claim = None if self._claims is None else self._claims.get(id)
            return "(in the ledger)" if claim is None else published(claim)
        if id not in self._values and self.foreign:
            return f"(not measured on {self.suite})"
        if id not in self._values:
            known = ", ".join(sorted(self._values)) or "nothing yet"
            raise Refusal(f"expected a recorded id, found {id!r}; recorded so far: {known}")
        value, interval = self._values[id]
        return prose.written(value, interval, form)

    def _check_id(self, id: str) -> None:
        if self._claims is None or (self.foreign and id not in self._claims):
            return
        claim = self._claims.get(id)
        if claim is None or claim.chapter != self.chapter:
            ours = [one.id for one in self._claims.values() if one.chapter == self.chapter]
            raise Refusal(
                f"expected an id that claims.yml gives to chapter {self.chapter}, found {id!r}; "
                f"add it, or use one of {', '.join(ours)}"
            )


def published(claim: Claim) -> str:
    """The paper's value of a claim as text, "not published" where there is none."""
    if claim.paper is None:
        return "not published"
    value = claim.paper.value
    if isinstance(value, str):
        return value
    # As printed there: rounding a published number would add or hide digits.
    return ", ".join(f"{one:g}" for one in (value if isinstance(value, list) else [value]))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on."""
    import platform

    found = {"python": platform.python_version()}
    for name in _STAMPED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _seed(seed: int) -> None:
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - chapters may call code that draws from the global state
    torch.manual_seed(seed)


def _display(data: dict[str, Any]) -> None:
    from IPython.display import display

    display(data, raw=True)


def _plain_value(id: str, value: object) -> Value:
    if hasattr(value, "tolist"):
        value = cast(Any, value).tolist()
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and math.isfinite(value):
        return _rounded(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = [_plain_value(id, one) for one in cast("Sequence[object]", value)]
        if numbers and all(isinstance(one, float) for one in numbers):
            return cast("list[float]", numbers)
    raise Refusal(
        f"{id}: expected a finite number, a truth value or a list of finite numbers, "
        f"found {value!r}; compute it before recording it"
    )


def _rounded(value: float | int) -> float:
    """Ten significant digits: those after them are of the order in which threads summed."""
    return float(f"{value:.10g}")


def _plain_interval(id: str, value: Value, interval: object) -> Interval | None:
    if interval is None:
        return None
    if hasattr(interval, "tolist"):
        interval = cast(Any, interval).tolist()
    if isinstance(value, list):
        pairs = cast("Sequence[object]", interval) if isinstance(interval, Sequence) else ()
        if len(pairs) != len(value):
            raise Refusal(
                f"{id}: expected one interval for each of the {len(value)} values, found "
                f"{interval!r}; pass a list of pairs"
            )
        return [_pair(id, one) for one in pairs]
    return _pair(id, interval)


def _pair(id: str, interval: object) -> tuple[float, float]:
    ends = list(cast("Sequence[Any]", interval)) if isinstance(interval, Sequence) else []
    if len(ends) in (2, 3):
        low, high = float(ends[-2]), float(ends[-1])
        if math.isfinite(low) and math.isfinite(high) and low <= high:
            return _rounded(low), _rounded(high)
    raise Refusal(
        f"{id}: expected an interval (low, high) with low <= high, found {interval!r}; "
        "pass the interval of this value"
    )


def _shown(value: Value, interval: Interval | None) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(f"{one:.4g}" for one in value) + "]"
    text = f"{value:.4g}"
    if interval is not None:
        low, high = cast("tuple[float, float]", interval)
        text += f" [{low:.4g}, {high:.4g}]"
    return text
