"""Tokens and names that try to become part of a page, and pages made of them."""

from __future__ import annotations

from pathlib import Path

from bs4 import BeautifulSoup

from darkmatter._latent_html import index, pages
from darkmatter.activations import Tokens
from darkmatter.latents import Example, LatentPage
from darkmatter.report import write_report
from darkmatter.tokenview import checked_sets, html_view
from tests.planted_survey import HOOK, planted_survey

# Each sets `fired` if it runs as what it looks like.
HOSTILE = (
    "<script>window.fired = 1</script>",
    "</textarea><script>window.fired = 1</script>",
    '"><img src=x onerror="window.fired = 1">',
    "' onmouseover='window.fired = 1' x='",
    "</style><script>window.fired = 1</script>",
    "</title></head><body onload='window.fired = 1'>",
    "--><svg onload=window.fired=1>",
    "]]><iframe srcdoc='<script>parent.fired = 1</script>'></iframe>",
    "<a href='javascript:window.fired = 1'>x</a>",
    "&lt;script&gt;window.fired = 1&lt;/script&gt;",
    "{{constructor.constructor('window.fired = 1')()}}",
    "$\\href{javascript:window.fired=1}{x}$",
)


def not_text(soup: BeautifulSoup) -> list[str]:
    """Elements and attributes of a page that run or fetch something."""
    found = [str(one)[:80] for one in soup.find_all(["script", "img", "iframe", "object", "embed"])]
    for element in soup.find_all(True):
        found += [f"{element.name} {key}" for key in element.attrs if key.startswith("on")]
        address = str(element.get("href", ""))
        found += [address] if address.lower().startswith("javascript") else []
    return found


def hostile_pages(folder: Path) -> list[Path]:
    """A report, the pages of two latents with their index, and a token view."""
    saes = {f"{HOSTILE[i]} {width}": (width, 8.0) for i, width in enumerate((512, 2048))}
    survey = planted_survey(saes, hooks=dict.fromkeys(saes, HOOK + HOSTILE[2]))
    numbers = range(len(survey.test.names))
    names = tuple(f"{HOSTILE[i % len(HOSTILE)]} {i}" for i in numbers)
    test = Tokens(survey.test.tokens, survey.test.document, names)
    settings = {"model": {"name": HOSTILE[0]}, HOSTILE[2]: list(HOSTILE)}
    settings["x"] = {HOSTILE[3]: HOSTILE[5]}
    object.__setattr__(survey, "test", test)
    object.__setattr__(survey, "settings", settings)
    object.__setattr__(survey, "pieces", dict(enumerate(HOSTILE)))
    written = [write_report(survey, folder / "report")]

    seen = Example(HOSTILE[2], 0, 5, 2.0, HOSTILE[:3], (0.0, 2.0, 0.5), 1)
    quiet = Example(HOSTILE[0], 0, 5, 2.0, HOSTILE[3:6], (float("nan"), 2.0, 0.5), 1)
    ends = tuple((one, 0.5) for one in HOSTILE)
    found = {
        latent: LatentPage(
            latent, HOSTILE[0], 100, 0.02, 2.0, 1.25, ((0.5, 0.6, 1),),
            {"top": (seen, quiet)}, ends, ends, ((7, 0.4),), None, None, None, None,
        )
        for latent in (3, 7)
    }  # fmt: skip
    texts = {**pages(found), "index.html": index(found, HOSTILE[0], 96, False)}

    values = {label: [float(i) for i in range(len(HOSTILE))] for label in HOSTILE[:4]}
    view = html_view(
        HOSTILE, checked_sets(HOSTILE, values), alt=HOSTILE[1], name="view", quantity=HOSTILE[2],
        unit=HOSTILE[3],
    )  # fmt: skip
    for kind, several in (("latents", texts), ("view", {"view.html": f"<main>{view}</main>"})):
        (folder / kind).mkdir(parents=True)
        for name, text in several.items():
            written.append(folder / kind / name)
            written[-1].write_text(text, encoding="utf-8")
    return written
