"""A page of HTML that needs nothing beside it: own style, no script, light and dark, any width."""

from __future__ import annotations

import html
import math
from pathlib import Path

from darkmatter._files import replacing
from darkmatter.intervals import Interval

_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;
--grid:#ddd;--panel:#f6f8fa;--link:#0a58a6;--mark:#0072b2}
@media (prefers-color-scheme:dark){:root{--ground:#15181d;--ink:#e6e9ee;--soft:#a3abb6;
--line:#3a414b;--grid:#343b45;--panel:#1e232a;--link:#7cb8f2;--mark:#56b4e9}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
font:1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:50rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1,h2,h3{line-height:1.25;overflow-wrap:anywhere}
h1{font-size:1.7rem;margin:.2em 0 .4em}
h2{font-size:1.25rem;margin:2.4em 0 .6em;padding-top:.6em;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.6em 0 .4em}
p,li,figcaption,dd,summary{overflow-wrap:anywhere}
a{color:var(--link)}
a:focus-visible,summary:focus-visible,.wide:focus-visible{outline:3px solid var(--mark);
outline-offset:2px}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:0;padding:0}
.soft{color:var(--soft)}
.headline{font-size:1.15rem;border-left:4px solid var(--mark);padding:.1em 0 .1em .9em;margin:1em 0}
.headline p{margin:.5em 0}
figure{margin:1.2em 0}
figure svg{display:block;width:100%;max-width:36rem;height:auto}
figcaption{color:var(--soft);font-size:.93rem;max-width:36rem;margin-top:.4em}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:4px;margin:1em 0}
table{border-collapse:collapse;font-size:.93rem;font-variant-numeric:tabular-nums}
th,td{padding:.45em .7em;text-align:right;vertical-align:top;border-bottom:1px solid var(--line)}
tr:last-child>*{border-bottom:0}
thead th{background:var(--panel);vertical-align:bottom}
th[scope=row],.text{text-align:left;font-weight:400;overflow-wrap:anywhere}
thead .text{font-weight:600}
th[scope=row]{min-width:9rem;max-width:16rem}
.ci{display:block;color:var(--soft);font-size:.85em;white-space:nowrap}
.headline .ci{display:inline;font-size:.8em}
dl{display:grid;grid-template-columns:minmax(7rem,14rem) 1fr;gap:.25em 1em;margin:.6em 0}
dt{color:var(--soft);overflow-wrap:anywhere}
dd{margin:0}
.code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.88em;overflow-wrap:anywhere}
main .token-view legend{float:left;width:100%;padding:0;background:none}
main .token-view legend+input+label{clear:left}
@media (max-width:34rem){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5em}
h1{font-size:1.4rem}}
@media print{.wide{overflow:visible}nav{display:none}}
"""


def escape(text: object) -> str:
    """Text as HTML, also inside attributes."""
    return html.escape(str(text))


def readable_name(name: str) -> str:
    """A model's name; of a folder, the last part of its path that says something."""
    if not Path(name).is_absolute():
        return name
    return next((p for p in reversed(Path(name).parts) if p not in ("model", "data")), name)


def page(title: str, body: str, style: str = "", frames: str = "") -> str:
    """A whole page. `title` is plain text, `body` HTML, `style` more rules of CSS.

    `frames`: sites that a frame of the page may show once the reader asks for it.
    """
    framed = f"; frame-src {frames}" if frames else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is fetched, even if a file is altered on its way.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'; img-src data:{framed}\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def number(value: float) -> str:
    """Three decimals, or three digits where they would hide the value; a true minus sign."""
    if math.isnan(value):
        return "–"
    plain = f"{value:.3f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.3g}"
    return plain.replace("-", "−")


def percent(value: float) -> str:
    """Whole per cent, one decimal below ten, two digits below a tenth."""
    if math.isnan(value):
        return "–"
    plain = f"{100 * value:.0f}" if abs(value) >= 0.0995 else f"{100 * value:.1f}"
    if 0 < abs(value) < 0.001:
        plain = f"{100 * value:.2g}"
    return plain.replace("-", "−") + "\u00a0%"


def with_interval(found: Interval, as_percent: bool = False) -> str:
    """A value with its interval behind, in HTML; without interval where there is none."""
    shown = percent if as_percent else number
    if math.isnan(found.low) or math.isnan(found.high):
        return shown(found.value)
    low, high = (shown(one).removesuffix("\u00a0%") for one in (found.low, found.high))
    return f'{shown(found.value)} <span class="ci">[{low}, {high}]</span>'


def write(path: Path, content: str | bytes) -> None:
    """Write a file under another name first, so that a reader never meets half of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
