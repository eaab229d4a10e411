"""environment.yml and requirements.lock say the same as pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from darkmatter.book.environment import environment_text, project_requirements

ROOT = Path(__file__).parents[2]
PYPROJECT = ROOT / "pyproject.toml"
PYTHON, LINES = project_requirements(PYPROJECT)
REQUIREMENTS = [Requirement(line) for line in LINES]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
# One entry is a line "name==version ; marker" and the indented --hash lines below it.
ENTRIES = re.sub(r"\\\n\s+", " ", LOCK).splitlines()
PINS = [Requirement(entry.split("--hash")[0].strip()) for entry in ENTRIES]
LEAVES_OUT = re.compile(r"torch$|triton$|cuda-|nvidia-")
FIXED_BY_THE_READERS = {
    *("jupyter-book", "torch", "transformer-lens", "sae-lens"),
    *("nnsight", "matplotlib", "ipywidgets", "papermill"),
}


def test_environment_is_what_pyproject_makes() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert text == environment_text(PYPROJECT), "run `make lock`"


def test_environment_is_conda_with_a_pip_section() -> None:
    parsed = yaml.safe_load(environment_text(PYPROJECT))
    python, pip, section = parsed["dependencies"]
    assert python == f"python{PYTHON}"
    assert pip == "pip"
    assert section["pip"][-1] == "-e ."
    named = {canonicalize_name(Requirement(line).name) for line in section["pip"][:-1]}
    assert named >= FIXED_BY_THE_READERS
    for line in section["pip"][:-1]:
        assert Requirement(line).specifier, f"{line} has no range"


def test_a_changed_range_changes_the_environment(tmp_path: Path) -> None:
    changed = tmp_path / "pyproject.toml"
    changed.write_text(
        '[project]\nrequires-python = ">=3.11"\ndependencies = ["torch>=9"]\n'
        '[project.optional-dependencies]\nbook = ["torch>=9", "papermill>=3"]\n'
    )
    pip = yaml.safe_load(environment_text(changed))["dependencies"][-1]["pip"]
    assert pip == ["torch>=9", "papermill>=3", "-e ."]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_the_lock_is_inside_the_range(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if name == "torch":
        return
    pins = [pin for pin in PINS if canonicalize_name(pin.name) == name]
    assert pins, f"{name} is missing from requirements.lock: run `make lock`"
    for pin in pins:
        (pinned,) = pin.specifier
        assert requirement.specifier.contains(pinned.version), f"{pin}: run `make lock`"


def test_every_entry_is_one_hashed_version() -> None:
    for entry, pin in zip(ENTRIES, PINS, strict=True):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
        assert [specifier.operator for specifier in pin.specifier] == ["=="], entry


def test_torch_and_what_comes_with_it_stay_out_of_the_lock() -> None:
    assert [pin.name for pin in PINS if LEAVES_OUT.match(canonicalize_name(pin.name))] == []


def test_the_lock_names_no_index() -> None:
    assert "://" not in LOCK
    assert not re.search(r"^--", LOCK, flags=re.MULTILINE)


def test_the_build_needs_nothing_outside_the_lock() -> None:
    # `make venv` installs the project without build isolation, so the lock has to hold the backend.
    for line in tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["build-system"]["requires"]:
        backend = Requirement(line)
        versions = [
            specifier.version
            for pin in PINS
            if canonicalize_name(pin.name) == backend.name and pin.marker is None
            for specifier in pin.specifier
        ]
        assert versions
        assert all(backend.specifier.contains(version) for version in versions)


def test_the_theme_has_one_header_bar() -> None:
    # From 1.2 on the theme draws a second bar with a second search field above the page.
    (theme,) = [r for r in REQUIREMENTS if r.name == "sphinx-book-theme"]
    assert not theme.specifier.contains("1.2")
    assert all(
        specifier.version in SpecifierSet("<1.2")
        for pin in PINS
        if pin.name == "sphinx-book-theme"
        for specifier in pin.specifier
    )


def test_makefile_and_lock_agree_on_what_torch_brings() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    match = re.search(r"^COMES_WITH_TORCH := (.*)$", makefile, flags=re.MULTILINE)
    assert match is not None
    names = match.group(1).split()
    assert "torch" in names
    assert all(LEAVES_OUT.match(name) for name in names)
