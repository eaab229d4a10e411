"""The report in a browser: no console error, nothing fetched, no sideways scroll on a phone.

With headless Chromium on PATH the page is laid out at the width of a phone and of a desk, light and
dark. What a parser alone can tell is checked everywhere.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup

from darkmatter.report import write_report
from tests.planted_survey import GRID, planted_survey

# Measured from outside, in frames, as the page itself runs no script.
_FRAMES = """<!doctype html><body style="margin:0">
<iframe src="{page}" width="360" height="800"></iframe>
<iframe src="{page}" width="1200" height="800"></iframe>
<pre id="found"></pre><script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const shown = element => element.getBoundingClientRect();
    const choose = page.querySelector(".token-view input:not([checked])");
    choose.checked = true;
    const panels = [...choose.closest("fieldset").querySelectorAll(".token-panel")];
    return {{
      wide: root.scrollWidth, room: root.clientWidth,
      right: Math.max(...[...page.querySelectorAll("p,h1,h2,svg,figcaption,dd,fieldset,li")]
        .map(one => shown(one).right)),
      figures: [...page.querySelectorAll("figure svg")].map(one => shown(one).height),
      panels: panels.map(one => getComputedStyle(one).display),
      ink: getComputedStyle(page.body).color, ground: getComputedStyle(page.body).backgroundColor,
      inks: [...page.querySelectorAll("figure svg text, figure svg")]
        .map(one => getComputedStyle(one).fill),
    }};
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saes = {
        f"a/rather_long/name_of_an_sae_without_a_place_to_break/{n}": v for n, v in GRID.items()
    }
    return write_report(planted_survey(saes), tmp_path_factory.mktemp("browser"))


def laid_out(chromium: str, report: Path, tmp_path: Path, dark: bool) -> list[dict[str, Any]]:
    frames = report.parent / f"frames-{dark}.html"
    frames.write_text(_FRAMES.format(page=report.name))
    run = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--allow-file-access-from-files", "--enable-logging=stderr", "--disable-quic",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
            frames.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in run.stderr
    found = BeautifulSoup(run.stdout, "html.parser").find(id="found")
    assert found is not None
    return json.loads(found.text)


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_a_desk(report: Path, tmp_path: Path, dark: bool) -> None:
    soup = BeautifulSoup(report.read_text(), "html.parser")
    assert soup.find("meta", {"name": "viewport"})["content"].startswith("width=device-width")
    # Only tables may be wider than a phone, and each of them moves inside its own frame.
    assert all(table.parent["class"] == ["wide"] for table in soup.find_all("table"))
    style = soup.style.text
    assert ".wide{overflow-x:auto" in style
    assert not re.search(r"(?<!max-)(?<!min-)width:\s*\d{3,}px", style)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        return
    for found in laid_out(chromium, report, tmp_path, dark):
        assert found["wide"] <= found["room"]
        # Half a pixel of rounding.
        assert found["right"] <= found["room"] + 0.5
        assert min(found["figures"]) > 100
        # The second set of values was chosen, so the second text is seen and no other.
        assert found["panels"] == ["none", "block", "none", "none"]
        ink = {False: "rgb(27, 31, 36)", True: "rgb(230, 233, 238)"}[dark]
        assert found["ink"] == ink
        assert found["ground"] != ink
        assert set(found["inks"]) == {ink}
