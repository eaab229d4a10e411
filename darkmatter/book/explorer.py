"""A figure with a setting to choose: each picture is drawn beforehand, so no kernel is needed.

On the page it is a radio button for each setting, and the style sheet shows the picture of the one
that is chosen: no script, no network. `live` draws the chosen picture in the kernel instead.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from darkmatter._drawing import as_png, as_svg
from darkmatter._refusal import Refusal
from darkmatter.book.figures import FIGURE_KEY, check_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Setting = TypeVar("Setting")

_MOST_SETTINGS = 12
_LARGEST_SVG = 150_000
# The pictures keep the white ground of figures, also on a dark page.
_STYLE = (
    ".explorer{{background:#fff;color:#000;border:1px solid #767676;border-radius:4px;"
    "padding:.4em .8em;margin:0;min-width:0;text-align:left;color-scheme:light}}"
    ".explorer legend{{font-weight:600;padding:0 .3em;background:#fff;color:#000;width:auto;"
    "float:none;margin:0;font-size:1em}}"
    ".explorer label{{margin:0 1.2em 0 .3em;padding:.15em 0;cursor:pointer;color:#000}}"
    ".explorer input{{accent-color:#0072b2}}"
    ".explorer input:focus-visible{{outline:3px solid #0072b2;outline-offset:2px}}"
    ".explorer .explorer-panel{{display:none}}"
    ".explorer img{{max-width:100%;height:auto;margin:.4em 0 0;filter:none!important}}"
    "{chosen}{{display:block}}"
)


def explore(
    draw: Callable[[Setting], tuple[Figure, str]],
    settings: Mapping[str, Setting],
    *,
    quantity: str,
    caption: str,
    name: str,
    live: bool = False,
) -> None:
    """Show `draw(setting)` for one of the `settings` at a time, which the reader chooses.

    `draw` gives a figure and the sentence that says what is seen in it; `settings` maps labels,
    such as "8" and "64", to what `draw` takes, and `quantity` names them, such as "L0". Draw every
    picture on the same axes, or steps cannot be compared. `caption` and `name` are as in `show`.
    With `live` the chosen picture is drawn by the kernel when a slider moves (ipywidgets).

    Raises `Refusal` for fewer than 2 or more than 12 settings, an empty quantity, and words as in
    `show`.
    """
    if not 2 <= len(settings) <= _MOST_SETTINGS:
        raise Refusal(
            f"expected 2 to {_MOST_SETTINGS} settings to step through, found {len(settings)}; "
            "show one picture with book.show, or choose fewer"
        )
    if not quantity.strip():
        raise Refusal(f"expected quantity as a word such as 'L0', found {quantity!r}; name it")
    if live:
        _show_live(draw, settings, quantity, caption, name)
        return
    pictures: dict[str, str] = {}
    sentences: list[str] = []
    first = b""
    from IPython.display import display
    from matplotlib import pyplot

    for label, setting in settings.items():
        figure, seen = draw(setting)
        check_words(alt=seen, caption=caption, name=name)
        first = first or as_png(figure)
        pictures[label] = _picture(figure, seen)
        sentences.append(f"{quantity} {label}: {seen}")
        pyplot.close(figure)
    told = "\n".join(sentences)
    display(
        {
            "text/plain": told,
            "text/html": _page(pictures, quantity, name),
            # Where HTML is not shown, as in print, the first picture stands for all.
            "image/png": base64.b64encode(first).decode(),
        },
        raw=True,
        metadata={FIGURE_KEY: {"alt": told, "caption": caption, "name": name}},
    )


def _picture(figure: Figure, seen: str) -> str:
    """An `<img>` that holds its own data: as SVG, or as PNG where that would be large."""
    drawing = as_svg(figure).encode()
    small = len(drawing) <= _LARGEST_SVG
    kind, data = ("svg+xml", drawing) if small else ("png", as_png(figure))
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(seen)}" src="data:image/{kind};base64,{encoded}">'


def _page(pictures: Mapping[str, str], quantity: str, name: str) -> str:
    ids = [f"{name}-set-{n}" for n in range(1, len(pictures) + 1)]
    chosen = ",".join(f"#{id}:checked~#{id}-panel" for id in ids)
    buttons = "".join(
        f'<input type="radio" name="{name}-set" id="{id}"{" checked" * (n == 0)}>'
        f'<label for="{id}">{html.escape(label)}</label>'
        for n, (id, label) in enumerate(zip(ids, pictures, strict=True))
    )
    panels = "".join(
        f'<div class="explorer-panel" id="{id}-panel">{picture}</div>'
        for id, picture in zip(ids, pictures.values(), strict=True)
    )
    return (
        f"<style>{_STYLE.format(chosen=chosen)}</style>"
        f'<fieldset class="explorer"><legend>{html.escape(quantity)}</legend>'
        f"{buttons}{panels}</fieldset>"
    )


def _show_live(
    draw: Callable[[Setting], tuple[Figure, str]],
    settings: Mapping[str, Setting],
    quantity: str,
    caption: str,
    name: str,
) -> None:
    import ipywidgets
    from IPython.display import display
    from matplotlib import pyplot

    slider = ipywidgets.SelectionSlider(options=list(settings), description=quantity)
    picture = ipywidgets.HTML()

    def move(_: object = None) -> None:
        figure, seen = draw(settings[str(slider.value)])
        check_words(alt=seen, caption=caption, name=name)
        picture.value = _picture(figure, seen)
        pyplot.close(figure)

    move()
    slider.observe(move, "value")
    display(ipywidgets.VBox([slider, picture, ipywidgets.HTML(html.escape(caption))]))
