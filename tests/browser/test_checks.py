"""Each check sees the fault it is there for: a good page is broken in one respect at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, Page

from tests.browser import checks
from tests.browser.browsing import visit

ARTICLE = "document.querySelector('article')"
ADD = ARTICLE + ".insertAdjacentHTML('beforeend', `{}`)"


def _light(page: Page) -> list[str]:
    return checks.contrasts(page, "light")


def _dark(page: Page) -> list[str]:
    return checks.contrasts(page, "dark")


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        (ADD.format("<p>mean of $x_i$ over i</p>"), checks.formulas, "a raw formula"),
        (ADD.format(r"<p>mean of \\(x\\)</p>"), checks.formulas, "a raw formula"),
        (ADD.format("<mjx-merror data-mjx-error='Undefined'></mjx-merror>"),
         checks.errors_of_mathematics, "MathJax: Undefined"),
        (ADD.format("<details><summary>Empty</summary></details>"), checks.folds,
         "nothing in Empty"),
        ("document.querySelector('article details summary').onclick = () => false", checks.folds,
         "does not open"),
        ("document.querySelector('article .token-panel').remove()", checks.steppers,
         "shows 0 pictures"),
        ("document.querySelectorAll('article .token-panel')"
         ".forEach((one) => { one.innerHTML = 'same' })", checks.steppers, "show the same picture"),
        ("document.querySelectorAll('article input[type=radio]')[1].disabled = true",
         checks.steppers, "does not reach choice 2"),
        ("document.querySelector('article img').alt = 'a plot'", checks.pictures, "no sentence on"),
        ("document.querySelector('article img').src = 'gone.png'", checks.pictures,
         "does not load"),
        ("document.querySelectorAll('article figcaption').forEach((one) => one.remove())",
         checks.pictures, "no caption below"),
        (ADD.format("<i id='twin'></i><i id='twin'></i>"), checks.ids, "the id twin"),
        (ADD.format("<p style='color: #999'>pale</p>"), _light, 'contrast 2.85 of p. "pale"'),
        (ADD.format("<p style='color: #333'>murky</p>"), _dark, "dark: contrast"),
        (ADD.format("<h6>Too deep</h6>"), checks.axe, "axe heading-order"),
        (ADD.format("<button></button>"), checks.axe, "axe button-name"),
        (ADD.format("<input>"), checks.axe, "axe label"),
        (ADD.format("<div style='width: 500px'>wide</div>"), checks.phone, "ends at"),
        (ADD.format("<a href='#x' tabindex='3'>first</a>"), checks.keyboard, "tab does not reach"),
        (ADD.format("<a href='#x' tabindex='-1'>never</a>"), checks.keyboard, "tab does not reach"),
        (ADD.format("<style>* { outline: none !important; box-shadow: none !important }"
                    "article a:focus { color: inherit; text-decoration: none }</style>"
                    "<a href='#x' style='all: unset'>unseen</a>"), checks.tab_walk,
         "the focus is not seen on"),
        (ADD.format("<a href='#x' tabindex='3'>first</a>"), checks.tab_walk, "tab goes back"),
    ],
)  # fmt: skip
def test_a_fault_is_named(
    browser: Browser, mini: str, fault: str, check: Callable[[Page], list[str]], message: str
) -> None:
    with visit(browser, mini, "99_mini.html") as here:
        page = here.open()
        checks.formulas(page)
        page.evaluate(fault)
        found = check(page)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fetch('https://example.org/a.js').catch(() => {})", "from outside"),
        ("fetch('gone.json')", "404 for"),
        ("console.error('broken')", "console: broken"),
        ("setTimeout(() => { throw new Error('late') })", "script error: late"),
    ],
)
def test_errors_and_requests_are_recorded(
    browser: Browser, mini: str, fault: str, message: str
) -> None:
    with visit(browser, mini, "99_mini.html") as here:
        page = here.open()
        page.evaluate(f"() => {{ {fault} }}")
        page.wait_for_load_state("networkidle")
        assert any(message in problem for problem in here.problems), here.problems


def test_a_stepper_that_needs_scripts_is_named(browser: Browser, mini: str) -> None:
    with visit(browser, mini, "99_mini.html", scripts=False) as here:
        page = here.open()
        page.evaluate(
            "() => document.head.insertAdjacentHTML('beforeend',"
            " '<style>.token-panel { display: block !important }</style>')"
        )
        assert "a stepper does not move without scripts" in checks.without_scripts(page)
