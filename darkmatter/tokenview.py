"""A text with a value on every token, as one block of HTML that needs neither script nor colour.

The block carries its own style: a radio button for each set of values, and below it the text with
the value of each token as background. Which text is seen is decided by the style sheet alone
(`input:checked ~ ...`), so it works in a file that is sent, offline, with scripts off, and in
Jupyter and Colab.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from darkmatter._refusal import Refusal

LEVELS = 10
_MOST_SETS = 8
_MOST_TOKENS = 2000
_NAMED_LARGEST = 5
# White over yellow and orange to vermilion: lightness falls all the way, so the order is seen
# without colour, and black text keeps a contrast of at least 4.5 (WCAG AA) on the darkest.
_RAMP = ((255, 255, 255), (253, 231, 169), (245, 176, 65), (214, 100, 20))
_STYLE = (
    # A white ground of its own, as figures have: the same colours are read on a dark page.
    ".token-view{{background:#fff;color:#000;border:1px solid #767676;border-radius:4px;"
    "padding:.6em .8em;margin:0;min-width:0;font-size:.95em;text-align:left;"
    "position:relative;color-scheme:light}}"
    ".token-view legend{{font-weight:600;padding:0 .3em;background:#fff;color:#000;"
    "width:auto;float:none;margin:0;font-size:1em}}"
    # The button is drawn by its label, so that a line never ends between the two; the real one
    # is there for the keyboard and for screen readers.
    ".token-view input{{position:absolute;opacity:0;width:1px;height:1px;margin:0}}"
    ".token-view label{{display:inline-block;margin:0 .9em .2em 0;padding:.15em .2em;"
    "cursor:pointer;color:#000}}"
    ".token-view label::before{{content:'';display:inline-block;width:.7em;height:.7em;"
    "border:2px solid #595959;border-radius:50%;margin-right:.4em;vertical-align:-.08em}}"
    ".token-view input:checked+label::before{{border-color:#0072b2;background:#0072b2;"
    "box-shadow:inset 0 0 0 2px #fff}}"
    ".token-view input:checked+label{{font-weight:600;text-decoration:underline}}"
    ".token-view input:focus-visible+label{{outline:3px solid #0072b2}}"
    ".token-view .token-panel{{display:none}}"
    "{chosen}{{display:block}}"
    ".token-view .token-text{{font-family:monospace;line-height:1.7;margin:.5em 0;padding:0;"
    "white-space:break-spaces;overflow-wrap:anywhere;color:#000;background:#fff}}"
    ".token-view .token-text span,.token-view .token-scale i{{unicode-bidi:isolate;"
    "color:#000;-webkit-print-color-adjust:exact;print-color-adjust:exact;"
    "forced-color-adjust:none}}"
    ".token-view .token-scale i{{display:inline-block;width:1.4em;height:1em;"
    "vertical-align:middle;border:1px solid #767676;border-left-width:0}}"
    ".token-view .token-scale i:first-of-type{{border-left-width:1px}}"
    ".token-view .token-scale,.token-view .token-largest{{margin:.2em 0;color:#000}}"
    ".token-view .token-absent{{color:#595959!important;background:#fff}}"
)


def checked_sets(tokens: Sequence[str], values: Mapping[str, Any]) -> dict[str, list[float]]:
    """Each set of values, of any array type, as one float a token; NaN was not measured.

    Raises Refusal for no tokens, over 2000 tokens, no set, over 8 sets, a set of another length,
    infinity, or nothing measured.
    """
    if isinstance(tokens, str) or not 1 <= len(tokens) <= _MOST_TOKENS:
        raise Refusal(
            f"expected 1 to {_MOST_TOKENS} tokens as a list of strings, found "
            f"{'one string' if isinstance(tokens, str) else len(tokens)}; cut the text"
        )
    if not 1 <= len(values) <= _MOST_SETS:
        raise Refusal(
            f"expected 1 to {_MOST_SETS} sets of values, found {len(values)}; "
            "pass {label: one value for each token}"
        )
    sets: dict[str, list[float]] = {}
    for label, given in values.items():
        plain = given.tolist() if hasattr(given, "tolist") else list(given)
        if len(plain) != len(tokens) or any(isinstance(one, list | tuple) for one in plain):
            raise Refusal(
                f"expected one value of {label!r} for each of the {len(tokens)} tokens, found "
                f"{len(plain)}; pass a flat list of that length"
            )
        sets[label] = [float(one) for one in plain]
        if any(math.isinf(one) for one in sets[label]):
            raise Refusal(
                f"expected finite values of {label!r}, found infinity at token "
                f"{next(i for i, one in enumerate(sets[label]) if math.isinf(one))}; "
                "pass NaN for a token that was not measured"
            )
        if all(math.isnan(one) for one in sets[label]):
            raise Refusal(f"expected some values of {label!r}, found only NaN; leave the set out")
    return sets


def visible(token: str) -> str:
    """A token with signs for what would not be seen: a line break is followed by itself."""
    return "".join(_sign(letter) for letter in token) or "∅"


def _sign(letter: str) -> str:
    if letter == "\n":
        return "↵\n"
    if letter == "\t":
        return "⇥"
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"‹{ord(letter):X}›"
    return letter


def colour(level: int) -> str:
    """Background of a level from 0 to 9, as #rrggbb."""
    place = level / (LEVELS - 1) * (len(_RAMP) - 1)
    start = min(int(place), len(_RAMP) - 2)
    mixed = (
        round(a + (place - start) * (b - a))
        for a, b in zip(_RAMP[start], _RAMP[start + 1], strict=True)
    )
    return "#" + "".join(f"{one:02x}" for one in mixed)


def level_of(value: float, low: float, high: float) -> int:
    """Level from 0 to 9 of a value on the scale from low to high."""
    return min(LEVELS - 1, int(LEVELS * (value - low) / (high - low))) if high > low else 0


def plain_view(
    tokens: Sequence[str],
    sets: Mapping[str, list[float]],
    *,
    alt: str,
    quantity: str,
    unit: str,
) -> str:
    """The text and the tokens of largest value, for where no HTML is shown."""
    rows = [f"{label}: largest {quantity} ({unit}): {_largest(tokens, each)}"
            for label, each in sets.items()]  # fmt: skip
    return "\n".join([alt, "".join(tokens), *rows])


def html_view(
    tokens: Sequence[str],
    sets: Mapping[str, list[float]],
    *,
    alt: str,
    name: str,
    quantity: str,
    unit: str,
) -> str:
    """The block of HTML; `sets` as `checked_sets` gives them, `name` is unique on its page.

    One colour scale serves all sets, from the least to the largest value.
    """
    measured = [one for each in sets.values() for one in each if not math.isnan(one)]
    low, high = min(measured), max(measured)
    ids = [f"{name}-set-{n}" for n in range(1, len(sets) + 1)]
    chosen = ",".join(f"#{id}:checked~#{id}-panel" for id in ids)
    levels = "".join(
        f".token-view .token-{level}{{background:{colour(level)}}}" for level in range(LEVELS)
    )
    escaped = html.escape
    buttons = "".join(
        f'<input type="radio" name="{name}-set" id="{id}"{" checked" * (n == 0)}>'
        f'<label for="{id}">{escaped(label)}</label>'
        for n, (id, label) in enumerate(zip(ids, sets, strict=True))
    )
    swatches = "".join(f'<i class="token-{level}"></i>' for level in range(LEVELS))
    scale = f"{low:.3g} {swatches} {high:.3g} {escaped(unit)}"
    panels = "".join(
        f'<div class="token-panel" id="{id}-panel" role="group" aria-label="{escaped(label)}">'
        f'<p class="token-text">{_text(tokens, each, low, high, unit)}</p>'
        f'<p class="token-largest">{escaped(label)}, largest: '
        f"{escaped(_largest(tokens, each))}</p></div>"
        for id, (label, each) in zip(ids, sets.items(), strict=True)
    )
    return (
        f"<style>{_STYLE.format(chosen=chosen)}{levels}</style>"
        f'<fieldset class="token-view" aria-describedby="{name}-alt">'
        f"<legend>{escaped(quantity)} ({escaped(unit)})</legend>{buttons}"
        f'<p class="token-scale">{scale}</p>'
        f'<p id="{name}-alt" hidden>{escaped(alt)}</p>{panels}</fieldset>'
    )


def _largest(tokens: Sequence[str], each: list[float]) -> str:
    """The tokens of largest value, in words."""
    order = sorted((i for i, one in enumerate(each) if not math.isnan(one)), key=lambda i: -each[i])
    return ", ".join(
        f"{visible(tokens[i]).strip() or 'spaces'} {each[i]:.3g}" for i in order[:_NAMED_LARGEST]
    )


def _text(tokens: Sequence[str], each: list[float], low: float, high: float, unit: str) -> str:
    spans: list[str] = []
    for token, value in zip(tokens, each, strict=True):
        if math.isnan(value):
            kind, told = "absent", "not measured"
        else:
            kind, told = str(level_of(value, low, high)), f"{value:.3g} {unit}"
        spans.append(
            f'<span class="token-{kind}" title="{html.escape(told)}">'
            f"{html.escape(visible(token))}</span>"
        )
    return "".join(spans)
