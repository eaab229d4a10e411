"""A latent's page in a browser: nothing of Neuronpedia's before the reader asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Route

from darkmatter._latent_html import pages
from darkmatter.latents import Example, LatentPage
from tests.browser.browsing import serve, visit

HOSTED = "https://www.neuronpedia.org/gpt2-small/8-res-jb/3"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    seen = Example("doc", 0, 5, 2.0, (" a", " cat", " sat"), (0.0, 2.0, 0.5), 1)
    one = LatentPage(
        latent=3,
        hook="blocks.8.hook_resid_pre",
        n_tokens=100,
        frequency=0.02,
        largest=2.0,
        mean=1.25,
        histogram=((0.5, 0.6, 1), (1.9, 2.1, 1)),
        bands={"top": (seen,)},
        raised=((" mat", 0.5),),
        lowered=((" dog", -0.5),),
        neighbours=((7, 0.4),),
        linear=None,
        nonlinear=None,
        activation=None,
        neuronpedia=HOSTED,
    )
    folder = tmp_path_factory.mktemp("latents")
    for name, content in pages({3: one}).items():
        (folder / name).write_text(content, encoding="utf-8")
    with serve(folder) as found:
        yield found


@pytest.mark.parametrize("scripts", [True, False])
def test_neuronpedia_is_asked_on_a_click_and_shown_in_the_frame(
    browser: Browser, address: str, scripts: bool
) -> None:
    with visit(browser, address, "latent-3.html", scripts=scripts) as here:
        page = here.open()
        page.locator("summary").click()
        page.locator("iframe").scroll_into_view_if_needed()
        page.wait_for_load_state("networkidle")
        # `visit` counts every request to another address as a problem, and every console error.
        assert here.problems == []
        asked: list[str] = []

        def answer(route: Route) -> None:
            asked.append(route.request.url)
            assert "referer" not in route.request.headers
            route.fulfill(content_type="text/html", body="<p id=there>its page</p>")

        page.route("https://www.neuronpedia.org/**", answer)
        page.get_by_role("link", name="into the frame").click()
        assert page.frame_locator("iframe").locator("#there").inner_text() == "its page"
        assert asked == [HOSTED + "?embed=true"]
        assert page.url == address + "latent-3.html"
        assert len(page.context.pages) == 1
        assert here.problems == []


def test_without_a_network_the_click_leaves_the_page_as_it_is(
    browser: Browser, address: str
) -> None:
    with visit(browser, address, "latent-3.html") as here:
        page = here.open()
        page.locator("summary").click()
        with page.expect_event("requestfailed") as failed:
            page.get_by_role("link", name="into the frame").click()
        assert failed.value.url == HOSTED + "?embed=true"
        assert page.url == address + "latent-3.html"
        assert page.get_by_role("heading", name="Latent 3").is_visible()
