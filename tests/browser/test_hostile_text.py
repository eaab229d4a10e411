"""Tokens and names that are scripts, in a browser, without the policy that forbids scripts."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Browser

from tests.browser.browsing import serve, visit
from tests.hostile import HOSTILE, hostile_pages

_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def test_no_script_of_a_token_or_a_name_runs(browser: Browser, tmp_path: Path) -> None:
    pages = hostile_pages(tmp_path)
    # That a script would be noticed: the same words, not escaped.
    (tmp_path / "raw.html").write_text(f"<main>{''.join(HOSTILE[:3])}</main>", encoding="utf-8")
    fired: list[str] = []
    with serve(tmp_path) as address:
        for page in [*pages, tmp_path / "raw.html"]:
            text = page.read_text(encoding="utf-8")
            page.write_text(_POLICY.sub("", text), encoding="utf-8")
            name = page.relative_to(tmp_path).as_posix()
            with visit(browser, address, name) as here:
                opened = here.open()
                for box in opened.locator("label, summary").all():
                    box.click(trial=False)
                if opened.evaluate("window.fired") is not None:
                    fired.append(name)
                elif name != "raw.html":
                    # Nothing was asked for, so no image of a token was either.
                    assert [p for p in here.problems if "favicon" not in p] == []
    assert fired == ["raw.html"]
