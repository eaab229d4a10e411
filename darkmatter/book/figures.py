"""Figures of one look: colours by role, legible on a phone, with a text for who cannot see."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, cast

from darkmatter._drawing import COLOURS, as_png, as_svg, house_settings
from darkmatter._refusal import Refusal

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

__all__ = ["COLOURS", "FIGURE_KEY", "check_words", "show", "use_house_style"]

FIGURE_KEY = "darkmatter"
_LARGEST_SVG = 600_000
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def use_house_style() -> None:
    """Set matplotlib's defaults to the style of the book, the cycle to its colours."""
    import matplotlib as mpl

    for key, setting in house_settings().items():
        mpl.rcParams[cast("RcKeyType", key)] = setting


def show(figure: Figure, *, alt: str, caption: str, name: str) -> None:
    """Show a figure as SVG and PNG with its text alternative and caption, and close it.

    `alt` says in a sentence what is seen, `caption` what the figure is, `name` is its label in the
    book. Text and caption travel in the output's metadata; the executor puts them where the page
    takes them from. An SVG over 600 kB is left out in favour of the PNG.

    Raises `Refusal` for a missing or short alt or caption, or a name that is not kebab-case.
    """
    check_words(alt=alt, caption=caption, name=name)
    from IPython.display import display
    from matplotlib import pyplot

    data: dict[str, str] = {"text/plain": alt}
    data["image/png"] = base64.b64encode(as_png(figure)).decode()
    drawing = as_svg(figure)
    if len(drawing) <= _LARGEST_SVG:
        data["image/svg+xml"] = drawing
    pyplot.close(figure)
    display(
        data,
        raw=True,
        metadata={FIGURE_KEY: {"alt": alt, "caption": caption, "name": name}},
    )


def check_words(*, alt: str, caption: str, name: str) -> None:
    """Raise `Refusal` unless alt and caption are sentences and name is kebab-case."""
    _check_text("alt", alt, 30)
    _check_text("caption", caption, 10)
    if not _NAME.fullmatch(name):
        raise Refusal(
            f"expected a name in kebab-case such as fig-breakdown, found {name!r}; rename it"
        )


def _check_text(key: str, text: object, least: int) -> None:
    if not isinstance(text, str) or len(text.strip()) < least or len(text.split()) < 3:
        raise Refusal(
            f"expected {key} as a sentence of at least {least} letters, found {text!r}; "
            "say what a reader who does not see the figure should know"
        )
