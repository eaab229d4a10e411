"""A text with a value on every token, shown in a notebook and a page of the book."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from darkmatter._refusal import Refusal
from darkmatter.book.figures import FIGURE_KEY, check_words
from darkmatter.tokenview import checked_sets, html_view, plain_view


def token_view(
    tokens: Sequence[str],
    values: Mapping[str, Any],
    *,
    alt: str,
    caption: str,
    name: str,
    unit: str,
    quantity: str = "value",
) -> None:
    """Show a text with each token on a background that says its value, one set of values at a time.

    `tokens` are the strings of the text in order; `values` maps the label of each set (such as
    "width 512") to one number a token, in any array type. NaN is a token that was not measured.
    One colour scale serves all sets, from the least to the largest value. `quantity` and `unit`
    say what is measured, in the legend and at each token. `alt`, `caption` and `name` are as in
    `show`. A token of line breaks, tabs or other invisible characters is shown by a sign.

    Raises `Refusal` for no tokens, over 2000 tokens, no set, over 8 sets, a set of another length,
    infinity, nothing measured, an empty quantity or unit, and words as in `show`.
    """
    check_words(alt=alt, caption=caption, name=name)
    sets = checked_sets(tokens, values)
    for what, word in (("quantity", quantity), ("unit", unit)):
        if not word.strip():
            raise Refusal(
                f'expected {what} as a word, found {word!r}; say it, such as "error norm" in "a.u."'
            )
    from IPython.display import display

    display(
        {
            "text/plain": plain_view(tokens, sets, alt=alt, quantity=quantity, unit=unit),
            "text/html": html_view(tokens, sets, alt=alt, name=name, quantity=quantity, unit=unit),
        },
        raw=True,
        metadata={FIGURE_KEY: {"alt": alt, "caption": caption, "name": name}},
    )
