"""Pages of latents as HTML: one a latent, an index, and the fragment that a notebook shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from darkmatter._page import escape, page, percent, readable_name
from darkmatter.tokenview import LEVELS, colour, level_of, visible

if TYPE_CHECKING:
    from darkmatter.latents import Example, LatentPage


_STYLE = (
    "".join(f".latent .a{i}{{background:{colour(i)};color:#000}}" for i in range(LEVELS))
    + ".latent .examples{list-style:none;padding:0;margin:.6em 0}"
    ".latent .examples li{padding:.45em 0;border-bottom:1px solid #8884}"
    ".latent .seen{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.9em;"
    "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6}"
    ".latent .seen span,.latent .seen b{border-radius:2px;print-color-adjust:exact;"
    "-webkit-print-color-adjust:exact}"
    ".latent .seen b{outline:2px solid;outline-offset:-1px}"
    ".latent .from{display:block;font-size:.85em;opacity:.8;overflow-wrap:anywhere}"
    ".latent .pairs{display:grid;gap:0 2rem;"
    "grid-template-columns:repeat(auto-fit,minmax(9rem,1fr))}"
    ".latent .pairs ol{margin:.3em 0;padding-left:1.6em}"
    ".latent svg{width:100%;max-width:28rem;height:auto;display:block}"
    ".latent code,.tokens{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.9em;"
    "overflow-wrap:anywhere}"
    ".latent code{white-space:pre-wrap;background:var(--panel,#8882);padding:0 .15em}"
    ".latent dl{display:grid;grid-template-columns:auto 1fr;gap:.2em 1em}.latent dd{margin:0}"
    ".latent iframe{width:100%;height:32rem;border:1px solid #8884;border-radius:4px}"
)
# Its pages are at the first; the second is where it sends on from or to.
_HOSTS = "https://www.neuronpedia.org https://neuronpedia.org"


def fragment(one: LatentPage) -> str:
    """One latent, to stand in another page."""
    return f'<style>{_STYLE}</style><div class="latent">{_body(one, frozenset())}</div>'


def pages(found: Mapping[int, LatentPage]) -> dict[str, str]:
    """Name of file -> page of each latent, linked with one another and with the index."""
    names, order = frozenset(found), list(found)
    files: dict[str, str] = {}
    for i, (latent, one) in enumerate(found.items()):
        around = [("previous", order[i - 1])] if i else []
        around += [("next", order[i + 1])] if i + 1 < len(order) else []
        links = "".join(f' · <a href="{_file(j)}">{word}</a>' for word, j in around)
        nav = f'<nav aria-label="Latents"><a href="index.html">all latents</a>{links}</nav>'
        body = f'{nav}<div class="latent">{_body(one, names)}</div>'
        frames = _HOSTS if one.neuronpedia else ""
        files[_file(latent)] = page(f"Latent {latent} of {one.hook}", body, _STYLE, frames)
    return files


def _file(latent: int) -> str:
    return f"latent-{latent}.html"


def _three(value: float) -> str:
    """Three digits; a dash where nothing was measured."""
    return "–" if math.isnan(value) else f"{value:.3g}".replace("-", "−")


def _sign(text: str) -> str:
    """A token on one line, in HTML."""
    return escape(visible(text).replace("\n", ""))


def _body(one: LatentPage, linked: frozenset[int]) -> str:
    link = (
        f' · <a href="{escape(one.neuronpedia)}" rel="noopener noreferrer">on Neuronpedia</a>'
        if one.neuronpedia
        else ""
    )
    parts = [
        f'<h1>Latent {one.latent}</h1><p class="soft">{escape(one.hook)}{link}</p>',
        f"<dl><dt>active on</dt><dd>{percent(one.frequency)} of {one.n_tokens:,} tokens</dd>"
        f"<dt>largest</dt><dd>{_three(one.largest)}</dd>"
        f"<dt>mean where active</dt><dd>{_three(one.mean)}</dd></dl>",
        _hosted(one),
    ]
    if not one.bands["top"]:
        parts.append("<p>It is not active on any of these tokens.</p>")
    else:
        parts.append(f"<h2>How active</h2>{_histogram(one)}")
    parts += [_error_shares(one), _ends_html(one), _near(one, linked)]
    titles = {"top": "Top contexts, the largest of each"}
    for band, examples in one.bands.items():
        title = titles.get(band, f"At {band} of the active tokens, drawn at random")
        if examples:
            rows = "".join(_row(example, one.largest) for example in examples)
            parts.append(f'<h2>{title}</h2><ul class="examples">{rows}</ul>')
    return "\n".join(part for part in parts if part)


def _hosted(one: LatentPage) -> str:
    """Neuronpedia's page in a frame, by its embed address (docs.neuronpedia.org, "Embeds").

    The frame has a name and no address: a link puts one into it, so that nothing is asked of
    another site before a click, in any browser and without script.
    """
    if not one.neuronpedia:
        return ""
    name = f"neuronpedia-{one.latent}"
    return (
        "<details><summary>Neuronpedia's page, here</summary>"
        f'<p><a href="{escape(one.neuronpedia)}?embed=true" target="{name}" '
        'referrerpolicy="no-referrer">Load it from www.neuronpedia.org into the frame</a>. '
        "Before that, nothing is loaded from there. Without a network the frame stays without it; "
        "the rest of this page needs none.</p>"
        f'<iframe name="{name}" title="Latent {one.latent} on Neuronpedia" '
        'referrerpolicy="no-referrer" sandbox="allow-scripts allow-same-origin allow-popups '
        'allow-popups-to-escape-sandbox"></iframe></details>'
    )


def _histogram(one: LatentPage) -> str:
    """Bars of equal width over quarter octaves."""
    most = max(count for *_, count in one.histogram)
    wide = 320 / len(one.histogram)
    bars = "".join(
        f'<rect x="{i * wide:.1f}" y="{80 - 76 * count / most:.1f}" width="{max(wide - 1, 1):.1f}" '
        f'height="{76 * count / most:.1f}"><title>{low:.3g} to {high:.3g}: {count:,} tokens</title>'
        "</rect>"
        for i, (low, high, count) in enumerate(one.histogram)
    )
    low, high = one.histogram[0][0], one.histogram[-1][1]
    told = (
        f"Histogram of the activations from {low:.3g} to {high:.3g} on a logarithmic axis; the "
        f"fullest bin has {most:,} tokens."
    )
    return (
        f'<svg viewBox="0 0 320 96" role="img" aria-label="{told}"><g fill="#0072b2">{bars}</g>'
        f'<path d="M0 80.5H320" stroke="currentColor"/><g fill="currentColor" font-size="11">'
        f'<text x="0" y="93">{low:.3g}</text>'
        f'<text x="320" y="93" text-anchor="end">{high:.3g}</text></g></svg>'
        '<p class="soft">Tokens over the activation, in quarter octaves (logarithmic).</p>'
    )


def _error_shares(one: LatentPage) -> str:
    if one.linear is None or one.nonlinear is None or one.activation is None:
        return ""
    return (
        f"<h2>What the SAE misses along it</h2><p>Variance along this direction, relative to an "
        f"average direction: {_three(one.linear)} for the linear error, "
        f"{_three(one.nonlinear)} for the nonlinear error; {_three(one.activation)} for the "
        'activations themselves.</p><p class="soft">d u′Cu / trace C, with u the decoder direction '
        "at unit length and C the covariance over these tokens; 1 is the average over all d "
        "directions of a basis.</p>"
    )


def _ends_html(one: LatentPage) -> str:
    if one.raised is None or one.lowered is None:
        return (
            "<h2>Next tokens</h2><p>Not shown: a norm stands between this hook and the residual "
            "stream, so the direction has no logits of its own.</p>"
        )
    columns = "".join(
        f"<div><h3>{title}</h3><ol>"
        + "".join(f"<li><code>{_sign(token)}</code> {_three(value)}</li>" for token, value in ends)
        + "</ol></div>"
        for title, ends in (("most raised", one.raised), ("most lowered", one.lowered))
    )
    return (
        f'<h2>Next tokens</h2><div class="pairs">{columns}</div><p class="soft">Change of '
        "the logit by an activation of 1 along the unit direction, less the mean over the "
        "vocabulary: the direction times the unembedding, without the final norm and without the "
        "blocks between.</p>"
    )


def _near(one: LatentPage, linked: frozenset[int]) -> str:
    if not one.neighbours:
        return ""
    rows = "".join(
        "<li>"
        + (f'<a href="{_file(j)}">latent {j}</a>' if j in linked else f"latent {j}")
        + f" {_three(cosine)}</li>"
        for j, cosine in one.neighbours
    )
    return (
        f'<h2>Nearest directions</h2><div class="pairs"><ol>{rows}</ol></div>'
        '<p class="soft">Signed cosine of the decoder directions.</p>'
    )


def _row(example: Example, largest: float) -> str:
    """One example; tokens where the latent is silent are plain text."""
    texts: list[str] = []
    for i, (token, value) in enumerate(zip(example.tokens, example.activations, strict=True)):
        text = _sign(token)
        if math.isnan(value):
            text = f'<i class="soft" title="not measured">{text}</i>'
        elif value != 0:
            tag = "b" if i == example.peak else "span"
            kind = level_of(abs(value), 0.0, largest)
            text = f'<{tag} class="a{kind}" title="{_three(value)}">{text}</{tag}>'
        texts.append(text)
    return (
        f'<li><span class="from">{_three(example.activation)} · {escape(example.document)}, '
        f'position {example.position}</span><span class="seen">{"".join(texts)}</span></li>'
    )


def index(found: Mapping[int, LatentPage], model: str, d_sae: int, chosen: bool) -> str:
    """The table of all latents; `chosen`: they were not asked for by number."""
    shares = any(one.linear is not None for one in found.values())
    heads = ["latent", "active on", "largest", *(["linear", "nonlinear"] if shares else [])]
    head = "".join(
        f'<th scope="col"{" class=text" if i == 0 else ""}>{one}</th>'
        for i, one in enumerate(heads)
    )
    head += '<th scope="col" class="text">tokens at the top</th>'
    head += '<th scope="col" class="text">raised</th>'
    rows: list[str] = []
    for latent, one in found.items():
        cells = [percent(one.frequency), _three(one.largest)]
        if shares:
            cells += [_three(math.nan if v is None else v) for v in (one.linear, one.nonlinear)]
        peaks = dict.fromkeys(e.tokens[e.peak] for e in one.bands["top"])
        raised = [token for token, _ in one.raised or ()][:5]
        rows.append(
            f'<tr><th scope="row"><a href="{_file(latent)}">{latent}</a></th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "".join(
                f'<td class="text tokens">{" · ".join(_sign(t) for t in list(some)[:5])}</td>'
                for some in (peaks, raised)
            )
            + "</tr>"
        )
    first = next(iter(found.values()))
    how = (
        "Chosen evenly over the order of frequency, from most to least active in the first "
        "contexts; latents silent there are not among them. "
        if chosen
        else ""
    )
    relative = (
        "Linear and nonlinear: variance of that part of the SAE's error along the latent's "
        "direction, relative to an average direction. "
        if shares
        else ""
    )
    name = readable_name(model)
    return page(
        f"Latents of {first.hook}",
        f'<header><p class="soft">Latents of a sparse autoencoder</p><h1>{len(found):,} of '
        f'{d_sae:,} latents</h1><p class="soft">{escape(first.hook)} of {escape(name)} · '
        f"{first.n_tokens:,} tokens</p></header><p>{how}{relative}</p>"
        '<div class="wide" tabindex="0" role="region" aria-label="Latents"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
        _STYLE,
    )
