"""Figures of one look: colours by role, legible on a phone, with a text for who cannot see."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from darkmatter._refusal import Refusal

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "activation": "#E69F00",
        "sae": "#009E73",
        "absent": "#56B4E9",
        "linear": "#0072B2",
        "nonlinear": "#D55E00",
        "control": "#CC79A7",
        "highlight": "#F0E442",
        "paper": "#000000",
    }
)
"""Okabe and Ito's colours, told apart by colour-blind readers too; one role, one colour."""

FIGURE_KEY = "darkmatter"
_LARGEST_SVG = 600_000
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_STYLE: dict[str, Any] = {
    "figure.figsize": (6.4, 4.2),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    # A white ground of its own: the same figure is read on a dark page.
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    # At 13 points a figure of 6.4 inches is still legible at the 360 pixels of a phone.
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.labelsize": 13,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "image.cmap": "cividis",
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    # Outlines: the same letters on every machine; a fixed salt: the same file at every run.
    "svg.fonttype": "path",
    "svg.hashsalt": "darkmatter",
}


def use_house_style() -> None:
    """Set matplotlib's defaults to the style of the book, the cycle to its colours."""
    import matplotlib as mpl
    from cycler import cycler

    order = ("linear", "nonlinear", "sae", "activation", "absent", "control", "paper")
    for key, setting in _STYLE.items():
        mpl.rcParams[cast("RcKeyType", key)] = setting
    mpl.rcParams["axes.prop_cycle"] = cycler(color=[COLOURS[role] for role in order])


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
    image = io.BytesIO()
    # No software and no date: the same figure is the same file.
    figure.savefig(image, format="png", metadata={"Software": None})
    data["image/png"] = base64.b64encode(image.getvalue()).decode()
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    if len(drawing.getvalue()) <= _LARGEST_SVG:
        data["image/svg+xml"] = drawing.getvalue()
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
