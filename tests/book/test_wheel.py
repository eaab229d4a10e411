"""The wheel of this tree: what Colab installs. Ranges, not pins, and everything a chapter reads."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without network from a copy: the build writes into its source."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(
        ROOT / "darkmatter", source / "darkmatter", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-index", "-w", str(source / "out"), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (source / "out").glob("*.whl")
    assert re.fullmatch(r"darkmatter_book-[\d.]+-py3-none-any\.whl", path.name)
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def required(metadata: Message) -> list[Requirement]:
    """What an installation without extras brings, which is what a chapter needs."""
    lines = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return [line for line in lines if "extra" not in str(line.marker or "")]


def test_every_requirement_is_a_range(required: list[Requirement]) -> None:
    assert len(required) > 10
    for line in required:
        operators = {one.operator for one in line.specifier}
        assert ">=" in operators, f"{line} has no lower end"
        assert not operators & {"==", "===", "~="}, f"{line} is a pin"
        assert line.url is None, f"{line} names an address"


def test_what_a_hosted_service_brings_is_kept(required: list[Requirement]) -> None:
    # Colab's own versions of these are newer than any we know; an upper end would replace them.
    ends = {line.name: {one.operator for one in line.specifier} for line in required}
    for name in ("torch", "numpy", "pandas", "scipy", "matplotlib", "ipywidgets"):
        assert not ends[name] & {"<", "<="}, name


def test_the_python_range_is_the_promised_one(metadata: Message) -> None:
    versions = SpecifierSet(metadata["Requires-Python"])
    assert all(version in versions for version in ("3.11.0", "3.12.9", "3.13.5"))
    assert "3.10.9" not in versions


def test_a_chapter_finds_all_it_reads(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    chapters = {path.name[:2] for path in (ROOT / "book").glob("[0-9]*.ipynb")}
    checks = {f"darkmatter/book/checks/chapter_{chapter}.py" for chapter in chapters}
    assert checks <= names
    data = ROOT / "darkmatter" / "suites" / "pydocs" / "data"
    files = {path.relative_to(ROOT).as_posix() for path in data.rglob("*") if path.is_file()}
    assert files
    assert files <= names
    assert "darkmatter/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "book/"))]
