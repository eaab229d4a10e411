"""The look of every figure, in the book and in reports, and its files, the same at every run."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

_CYCLE = ("linear", "nonlinear", "sae", "activation", "absent", "control", "paper")
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


def house_settings() -> dict[str, Any]:
    """matplotlib's settings for the style of the book, with the cycle of its colours."""
    from cycler import cycler

    return _STYLE | {"axes.prop_cycle": cycler(color=[COLOURS[role] for role in _CYCLE])}


@contextmanager
def house_style() -> Generator[None, None, None]:
    """Inside, matplotlib draws in the style of the book; afterwards its settings are as before.

    Names of files and SAEs are drawn as they are, not read as mathematics between dollar signs.
    """
    import matplotlib as mpl

    settings: Any = house_settings() | {"text.parse_math": False}
    with mpl.rc_context(settings):
        yield


def as_svg(figure: Figure) -> str:
    """The figure as SVG, without software or date: the same figure is the same file."""
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    return drawing.getvalue()


def as_png(figure: Figure) -> bytes:
    """The figure as PNG, without software: the same figure is the same file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def inline_svg(svg: str, name: str, alt: str) -> str:
    """A matplotlib SVG as part of a page: its ids made its own, its black and white the page's.

    Ink, ground and grid take the page's colours (`currentColor`, `--ground`, `--grid`), so that the
    same figure is read on a light and on a dark page.
    """
    body = re.sub(r"^.*?(?=<svg)", "", svg, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(href="|url\()#([^")]+)', rf"\1#{name}-\2", body)
    # A style sheet inside an inline SVG is that of the whole page.
    body = re.sub(r"<style[^>]*>\*\{(.*?)\}</style>", "", body, flags=re.DOTALL)
    for own, of_page in (
        ("#000000", "currentColor"),
        ("#ffffff", "var(--ground)"),
        ("#dddddd", "var(--grid)"),
    ):
        body = body.replace(own, of_page)
    head = (
        f'<svg role="img" aria-label="{html.escape(alt)}" fill="currentColor" '
        'stroke-linejoin="round" '
    )
    body = body.replace("<svg ", head, 1)
    return re.sub(r'( width| height)="[\d.]+(pt)?"', "", body, count=2).strip()
