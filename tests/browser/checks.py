"""What a reader, a keyboard and a screen reader need of a page: each check lists what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axe_playwright_python.base import AXE_FILE_PATH
from playwright.sync_api import Page
from playwright.sync_api import TimeoutError as Late

from tests.browser.browsing import DESKTOP, PHONE

_AXE = Path(AXE_FILE_PATH).read_text(encoding="utf-8")


def formulas(page: Page) -> list[str]:
    """Every formula is typeset, and none is left as dollars or backslashes in the text."""
    try:
        page.wait_for_function(
            """() => [...document.querySelectorAll('article .math')]
                .every((one) => one.querySelector('mjx-container'))"""
        )
    except Late:
        return ["a formula was not typeset in 30 seconds"]
    return page.evaluate(
        r"""() => {
          const walker = document.createTreeWalker(
            document.querySelector('article, main'), NodeFilter.SHOW_TEXT);
          const found = [];
          while (walker.nextNode()) {
            const text = walker.currentNode.data;
            const parent = walker.currentNode.parentElement;
            if (parent.closest('pre, code, script, style, mjx-container, .token-view')) continue;
            if (/\\[(\[]|\$[^\s$][^$]*\$/.test(text)) found.push('a raw formula: ' + text.trim());
          }
          return found;
        }"""
    )


def errors_of_mathematics(page: Page) -> list[str]:
    """No formula that MathJax could not read."""
    return page.evaluate(
        """() => [...document.querySelectorAll('mjx-merror')].map((one) => 'MathJax: ' +
            (one.getAttribute('data-mjx-error') || one.textContent))"""
    )


def folds(page: Page) -> list[str]:
    """Every fold opens when its summary is clicked, and then shows something."""
    return page.evaluate(
        """() => {
          const found = [];
          for (const fold of document.querySelectorAll('article details')) {
            const summary = fold.querySelector('summary');
            if (!summary) { found.push('a fold without a summary'); continue; }
            const label = summary.textContent.trim();
            const before = fold.open;
            summary.click();
            const shut = summary.getBoundingClientRect().height + 8;
            if (fold.open === before) found.push(`the fold ${label} does not open`);
            fold.open = true;
            if (fold.getBoundingClientRect().height <= shut) found.push(`nothing in ${label}`);
            fold.open = before;
          }
          return found;
        }"""
    )


def steppers(page: Page) -> list[str]:
    """With the keyboard alone, each choice of a stepper shows a picture of its own."""
    found: list[str] = []
    for index in range(page.locator("article fieldset:has([id$=-panel])").count()):
        view = page.locator("article fieldset:has([id$=-panel])").nth(index)
        buttons = view.locator("input[type=radio]")
        seen: list[str] = []
        buttons.first.focus()
        for number in range(buttons.count()):
            if number:
                page.keyboard.press("ArrowRight")
            if not buttons.nth(number).is_checked():
                found.append(f"stepper {index}: the right arrow does not reach choice {number + 1}")
                break
            shown = view.evaluate(
                """(view) => [...view.querySelectorAll('[id$=-panel]')]
                    .filter((panel) => panel.offsetParent)
                    .map((panel) => panel.innerHTML)"""
            )
            if len(shown) != 1:
                found.append(f"stepper {index}: choice {number + 1} shows {len(shown)} pictures")
                break
            seen.append(shown[0])
        if len(set(seen)) != len(seen):
            found.append(f"stepper {index}: two choices show the same picture")
    return found


def pictures(page: Page) -> list[str]:
    """Every picture of the text is loaded, described in a sentence, and has a caption."""
    return page.evaluate(
        """async () => {
          const found = [];
          for (const image of document.querySelectorAll('article img')) {
            image.loading = 'eager';
            await image.decode().catch(() => {});
            const name = image.getAttribute('src').slice(0, 60);
            if (!image.naturalWidth) found.push(`the picture ${name} does not load`);
            if (image.alt.trim().split(/\\s+/).length < 4) found.push(`no sentence on ${name}`);
            const caption = image.closest('figure')?.querySelector('figcaption');
            if (!caption?.textContent.trim()) found.push(`no caption below ${name}`);
          }
          return found;
        }"""
    )


def ids(page: Page) -> list[str]:
    """No id stands twice."""
    return page.evaluate(
        """() => {
          const seen = new Set(), twice = new Set();
          for (const one of document.querySelectorAll('[id]')) {
            if (one.closest('svg, mjx-container')) continue;
            (seen.has(one.id) ? twice : seen).add(one.id);
          }
          return [...twice].map((id) => `two elements have the id ${id}`);
        }"""
    )


def axe(page: Page) -> list[str]:
    """The rules of axe-core: names, roles, order of headings, landmarks, labels, tables, lists.

    It comes last: the thousands of spans of coloured code, formulas and coloured tokens become
    plain text first, which says the same to a screen reader and is read in a tenth of the time.
    """
    page.evaluate(_AXE)
    result: dict[str, Any] = page.evaluate(
        """() => {
          document.querySelectorAll('mjx-container').forEach((one) => one.replaceWith('formula'));
          for (const one of document.querySelectorAll('.highlight pre, .token-text'))
            one.textContent = one.textContent;
          return axe.run(document, {
            preload: false, resultTypes: ['violations'],
            // Contrast is measured by `contrasts`, in both themes.
            rules: {'color-contrast': {enabled: false}}
          });
        }"""
    )
    return [
        f"axe {violation['id']}: {violation['help']}: {node['html'][:160]}"
        for violation in result["violations"]
        for node in violation["nodes"][:3]
    ]


def contrasts(page: Page, theme: str) -> list[str]:
    """Text stands out from its ground by 4.5 to 1, large text by 3 to 1 (WCAG AA), in a theme."""
    return page.evaluate(_CONTRAST, theme)


_CONTRAST = """(theme) => {
  const root = document.documentElement;
  const before = [root.dataset.theme, root.dataset.mode];
  root.dataset.theme = root.dataset.mode = theme;
  const still = document.createElement('style');
  still.textContent = '*, *::before { transition: none !important }';
  document.head.append(still);
  // The longer notations, color(srgb ...), hold shares of one.
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
    return text.startsWith('color') ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = (top, below) =>
    [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const grounds = new Map();
  const ground = (element) => {
    if (!element) return [255, 255, 255, 1];
    if (!grounds.has(element)) {
      const own = parse(getComputedStyle(element).backgroundColor);
      grounds.set(element, own[3] === 1 ? own : over(own, ground(element.parentElement)));
    }
    return grounds.get(element);
  };
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((one) => one / 255)
      .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    if (!walker.currentNode.data.trim()) continue;
    const element = walker.currentNode.parentElement;
    if (element.closest('script, style, noscript, mjx-assistive-mml, svg')) continue;
    if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const style = getComputedStyle(element);
    const below = ground(element);
    const text = over(parse(style.color), below);
    const [a, b] = [light(text), light(below)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) {
      const kind = element.tagName.toLowerCase() + '.' + [...element.classList].join('.');
      const said = walker.currentNode.data.trim().slice(0, 40);
      const words = `${theme}: contrast ${ratio.toFixed(2)} of ${kind} "${said}"`;
      if (!found.has(kind + style.color + below)) found.set(kind + style.color + below, words);
    }
  }
  still.remove();
  [root.dataset.theme, root.dataset.mode] = before;
  return [...found.values()];
}"""


def phone(page: Page) -> list[str]:
    """At 360 pixels nothing moves sideways but what scrolls in a frame of its own."""
    page.set_viewport_size(PHONE)  # pyright: ignore[reportArgumentType] - a dict with both keys
    found = page.evaluate(
        """() => {
          const root = document.documentElement;
          const found = [];
          if (root.scrollWidth > root.clientWidth)
            found.push(`the page is ${root.scrollWidth} pixels wide on a phone`);
          for (const element of document.querySelectorAll('article *')) {
            const box = element.getBoundingClientRect();
            if (!box.width || box.right <= root.clientWidth + 1) continue;
            let frame = element.parentElement;
            while (frame && !/auto|scroll/.test(getComputedStyle(frame).overflowX))
              frame = frame.parentElement;
            // The page itself may not be the frame that scrolls.
            if (!frame || frame.matches('html, body, main, .bd-main, article'))
              found.push(`${element.tagName} ${element.className} ends at ${box.right | 0} of 360`);
          }
          return found.slice(0, 5);
        }"""
    )
    page.set_viewport_size(DESKTOP)  # pyright: ignore[reportArgumentType] - as above
    return found


_CAN_FOCUS = """() => [...document.querySelectorAll(
    'a[href], button, summary, input:not([type=hidden]), select, textarea')].filter((one) =>
  !one.disabled && one.checkVisibility({visibilityProperty: true}) &&
  !one.closest('[inert]') && one.getClientRects().length)"""


def keyboard(page: Page) -> list[str]:
    """What can be clicked can be reached with the tab key, in the order of the page."""
    return page.evaluate(
        f"""() => ({_CAN_FOCUS})().filter((one) => one.tabIndex !== 0)
          .map((one) => `tab does not reach in order: ${{one.outerHTML.slice(0, 120)}}`)"""
    )


def tab_walk(page: Page) -> list[str]:
    """Tab by tab through the page: everything is reached once, in order, and the focus is seen."""
    page.evaluate(
        f"""() => {{
          // One button of a group is a stop; the arrows move inside it.
          window.stops = ({_CAN_FOCUS})().filter((one) => one.type !== 'radio' || one.checked);
          window.looks = (one) => {{
            const shown = [one, one.nextElementSibling, one.parentElement].filter(Boolean);
            return shown.map((each) => {{
              const s = getComputedStyle(each);
              return [s.outlineStyle, s.outlineWidth, s.boxShadow, s.borderColor,
                      s.backgroundColor, s.textDecoration, s.color].join();
            }}).join('|');
          }};
          window.plain = new Map(stops.map((one) => [one, looks(one)]));
          window.visited = [];
          document.activeElement?.blur();
          window.scrollTo(0, 0);
        }}"""
    )
    total: int = page.evaluate("() => stops.length")
    found: list[str] = []
    # Frames that scroll are stops too, so there may be more presses than stops.
    for _ in range(3 * total):
        page.keyboard.press("Tab")
        done, problem = page.evaluate(
            """() => {
              const one = document.activeElement;
              if (!one || one === document.body) return [true, null];
              if (visited.includes(one)) return [true, null];
              visited.push(one);
              const before = plain.get(one);
              if (before === undefined || before !== looks(one)) return [false, null];
              return [false, 'the focus is not seen on ' + one.outerHTML.slice(0, 120)];
            }"""
        )
        if problem:
            found.append(problem)
        if done:
            break
    found += page.evaluate(
        """() => stops.filter((one) => !visited.includes(one)).slice(0, 5)
          .map((one) => 'tab does not reach ' + one.outerHTML.slice(0, 120))"""
    )
    order = page.evaluate(
        """() => {
          const reached = visited.filter((one) => plain.has(one));
          const late = reached.findIndex((one, i) => i > 0 && reached[i - 1]
            .compareDocumentPosition(one) & Node.DOCUMENT_POSITION_PRECEDING);
          return late < 0 ? [] : ['tab goes back to ' + reached[late].outerHTML.slice(0, 120)];
        }"""
    )
    return [*found, *order]


def without_scripts(page: Page) -> list[str]:
    """With scripts off: text on a ground, pictures, and one panel of each stepper."""
    found: list[str] = []
    article = page.locator("article")
    if len(article.inner_text().split()) < 5:
        found.append("no text without scripts")
    if article.evaluate("() => getComputedStyle(document.body).backgroundColor") in (
        "rgba(0, 0, 0, 0)",
        "transparent",
    ):
        found.append("no colours without scripts")
    found += pictures(page)
    for view in page.locator("article fieldset:has([id$=-panel])").all():
        panels = view.locator("[id$=-panel]")
        view.locator("label").last.click()
        if not panels.last.is_visible() or panels.first.is_visible():
            found.append("a stepper does not move without scripts")
    return found
