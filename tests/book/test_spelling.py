"""What codespell is told: British spellings, words that are right, and code that is no prose."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = configparser.ConfigParser(interpolation=None)
CONFIG.read(ROOT / ".codespellrc", encoding="utf-8")
SETTINGS = CONFIG["codespell"]
BRITISH = dict(
    line.split("->") for line in (ROOT / ".codespell-british.txt").read_text().splitlines()
)


def test_the_files_named_are_there() -> None:
    assert SETTINGS["dictionary"] == ".codespell-british.txt,-"
    assert (ROOT / SETTINGS["ignore-words"]).is_file()
    assert SETTINGS["builtin"].split(",") == ["clear", "rare"]


def test_the_dictionary_leads_to_words_that_are_right() -> None:
    assert len(BRITISH) > 80
    assert list(BRITISH) == sorted(BRITISH)
    assert not set(BRITISH) & set(BRITISH.values())
    assert all(re.fullmatch("[a-z]+", word) for pair in BRITISH.items() for word in pair)


def test_words_that_are_allowed_are_few_and_sorted() -> None:
    words = (ROOT / SETTINGS["ignore-words"]).read_text().split()
    assert words == sorted(set(words))
    assert not set(words) & set(BRITISH)


@pytest.mark.parametrize(
    "code",
    [
        'axes.plot(x, color=book.COLOURS["linear"])', "torch.nn.functional.normalize(x)",
        "from torch.nn.functional import normalize", 'ha="center"', 'loc="lower center"',
        "`normalize`", "a { color: inherit }", "a { background-color:#fff }", "normalize(x)",
        "[Layer normalization](https://arxiv.org)", "https://e.org/color", "color_map",
    ],
)  # fmt: skip
def test_code_is_not_read_as_prose(code: str) -> None:
    left = re.sub(SETTINGS["ignore-regex"], " ", code)
    assert not {word.lower() for word in re.findall(r"\w+", left)} & set(BRITISH)


@pytest.mark.parametrize(
    "prose", ["The color of noise.", "We normalize, then center it.", "a neighbor (behavior)"]
)
def test_prose_is_read(prose: str) -> None:
    left = re.sub(SETTINGS["ignore-regex"], " ", prose)
    assert {word.lower() for word in re.findall(r"\w+", left)} & set(BRITISH)
