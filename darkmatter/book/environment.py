"""environment.yml, made from pyproject.toml so that the two cannot disagree.

``python -m darkmatter.book.environment`` writes the file; ``make lock`` calls it after the lock.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_HEADER = """\
# Made from pyproject.toml by `make lock`; change the ranges there.
# conda env create -f environment.yml && conda activate darkmatter
"""


def project_requirements(pyproject: Path) -> tuple[str, list[str]]:
    """The Python range and every requirement of the project with all its extras.

    A package that several groups name appears once for each distinct range, in file order.
    """
    project: dict[str, Any] = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    groups: list[list[str]] = [
        project["dependencies"],
        *project.get("optional-dependencies", {}).values(),
    ]
    requirements = list(dict.fromkeys(line for group in groups for line in group))
    return project["requires-python"], requirements


def environment_text(pyproject: Path) -> str:
    """The text of environment.yml: Python and pip from conda, everything else by pip in ranges."""
    python, requirements = project_requirements(pyproject)
    pip = "\n".join(f'      - "{requirement}"' for requirement in requirements)
    return f"""{_HEADER}name: darkmatter
channels:
  - conda-forge
dependencies:
  - python{python}
  - pip
  - pip:
{pip}
      - "-e ."
"""


def write(root: Path = ROOT) -> None:
    """Write ``root/environment.yml`` from ``root/pyproject.toml``."""
    text = environment_text(root / "pyproject.toml")
    (root / "environment.yml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
