"""TeX formulas as MathML: what an EPUB reader or a slide typesets without scripts and network.

Also a Sphinx extension: with `html_math_renderer = "mathml"` the pages of a builder carry MathML.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from darkmatter._refusal import Refusal

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.application import Sphinx

_NAMESPACE = "http://www.w3.org/1998/Math/MathML"
# Written in TeX's short forms, or in LaTeX that docutils does not know.
_SHORT_FRACTION = re.compile(r"\\([td]?frac)\s*(\d)\s*(\d|\{|\\[a-z]+)")
_SIZED = re.compile(r"\\[Bb]igg?[lmr]?(?![a-zA-Z])\s*")
_ACCENTS = set("ˆˉ˜˙→")
# Names that HTML knows and XML does not.
_ENTITY = re.compile(r"&(?!amp;|lt;|gt;)\w+;")
_DOTS = re.compile(r"\\dots(?![a-zA-Z])")


def mathml(tex: str, display: bool = False) -> str:
    """The `<math>` element of a formula; `display` sets it apart on a line of its own.

    Raises `Refusal` for a formula that cannot be read.
    """
    from docutils.utils.math.latex2mathml import tex2mathml

    plain = _DOTS.sub(r"\\ldots", _SIZED.sub("", tex.strip()))
    plain = _SHORT_FRACTION.sub(_braced, plain)
    try:
        # docutils signals what it cannot read with several exceptions, AttributeError among them.
        text = _ENTITY.sub(_character, str(tex2mathml(plain, as_block=display)))
        root = ElementTree.fromstring(re.sub(r"\n\s*", "", text))
    except Exception as error:
        raise Refusal(
            f"expected a formula that can be written as MathML, found {tex.strip()!r} ({error}); "
            "write it with simpler commands"
        ) from error
    for element in root.iter():
        _index_beside(element)
    ElementTree.register_namespace("", _NAMESPACE)
    return ElementTree.tostring(root, encoding="unicode")


def _index_beside(element: ElementTree.Element) -> None:
    """Turn docutils' reading of `\\hat x_t`, an index below the accented letter, into an index."""
    name = f"{{{_NAMESPACE}}}"
    if element.tag != f"{name}munderover" or element[2].text not in _ACCENTS:
        return
    letter, index, accent = list(element)
    element.tag = f"{name}msub"
    element[:] = [ElementTree.Element(f"{name}mover", {"accent": "true"}), index]
    element[0].extend([letter, accent])


def _character(entity: re.Match[str]) -> str:
    return html.unescape(entity[0])


def _braced(match: re.Match[str]) -> str:
    rest = match[3] if match[3].startswith(("{", "\\")) else f"{{{match[3]}}}"
    return f"\\{match[1]}{{{match[2]}}}{rest}"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer "mathml" with Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(translator: Any, node: Element) -> None:
    from docutils.nodes import SkipNode

    translator.body.append(mathml(node.astext()))
    raise SkipNode


def _block(translator: Any, node: Element) -> None:
    from docutils.nodes import SkipNode

    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    names = "".join(f'<span id="{id}"></span>' for id in node.get("ids", []))
    translator.body.append(f'<div class="math">{names}{number}{mathml(node.astext(), True)}</div>')
    raise SkipNode
