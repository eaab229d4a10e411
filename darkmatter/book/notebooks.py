"""Chapters as text: percent format to notebook and back, the setup cell, and reading notebooks.

A chapter is committed as a notebook without outputs. Authors may write it as percent-format text
(`# %% [markdown]`, `# %% tags=["parameters"]`, `# %% [setup]`) and convert it with
`python -m darkmatter.book convert chapter.py book/02_name.ipynb`; the same text always gives the
same file, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from darkmatter._files import replacing
from darkmatter._refusal import Refusal

if TYPE_CHECKING:
    from nbformat import NotebookNode

DISTRIBUTION = "darkmatter-book"
_HEADER = re.compile(r"^# %%(?: \[(?P<kind>[a-z]+)\])?(?: tags=(?P<tags>\[.*\]))?\s*$")
_KINDS = ("markdown", "setup")
SOLUTION_TAG = "solution"
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}


def setup_cell(repository: str) -> str:
    """Source of the one setup cell of every chapter: installs on Colab only, imports everywhere.

    `repository` is the public address of the project, as `_config.yml` gives it.
    """
    return (
        "import sys\n"
        'if "google.colab" in sys.modules:\n'
        f'    %pip install -q "{DISTRIBUTION} @ git+{repository}"\n'
        "import darkmatter as dm\n"
        "from darkmatter import book"
    )


def repository_of(config: Path) -> str:
    """The public address of the repository: `repository.url` of `_config.yml`, the one place."""
    import yaml

    content: Any = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    try:
        address: Any = content["repository"]["url"]
    except (KeyError, TypeError):
        address = None
    if not isinstance(address, str) or not address.startswith("https://"):
        raise Refusal(
            f"expected an https address under repository: url: in {config}, found {address!r}; "
            "write it there, since setup cells and Colab links are made from it"
        )
    return address.rstrip("/")


def from_percent(text: str, repository: str | None = None) -> NotebookNode:
    """Make a notebook without outputs from percent-format text.

    Cells start at lines `# %%` (code), `# %% [markdown]` or `# %% [setup]`, each optionally with
    `tags=["a", "b"]`. Markdown is written either as lines beginning with `# ` or between lines
    holding three double quotes. `[setup]` has no body: it is filled with `setup_cell(repository)`.
    Cell ids are hashes of the cell, so that an edit changes the ids of the edited cells only.

    Raises `Refusal` for a header that cannot be read, text before the first header, or a setup
    cell without a repository.
    """
    from nbformat import v4

    cells: list[NotebookNode] = []
    seen: dict[str, int] = {}
    for number, header, body in _split(text):
        match = _HEADER.match(header)
        kind = match["kind"] if match else None
        if match is None or (kind is not None and kind not in _KINDS):
            raise Refusal(
                f'line {number}: expected "# %%", "# %% [markdown]" or "# %% [setup]", each '
                f'optionally followed by tags=["name"], found {header!r}; correct the header'
            )
        tags = _tags(match["tags"], number)
        if kind == "markdown":
            cell = v4.new_markdown_cell(_uncommented(body, number))
        elif kind == "setup":
            cell = v4.new_code_cell(_setup(body, number, repository))
        else:
            cell = v4.new_code_cell("\n".join(body).strip("\n"))
        if tags:
            cell.metadata["tags"] = tags
        if kind is None and SOLUTION_TAG in tags:
            cell.metadata["jupyter"] = {"source_hidden": True}
        digest = hashlib.sha256(
            json.dumps([cell.cell_type, cell.source, tags]).encode()
        ).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cells.append(cell)
    if not cells:
        raise Refusal('expected at least one cell, found none; start a cell with a line "# %%"')
    return v4.new_notebook(cells=cells, metadata=_METADATA)


def to_percent(notebook: NotebookNode) -> str:
    """Percent-format text of a notebook; `from_percent` of it gives the same cells back.

    The setup cell is written out as code: the text does not depend on where it was made.
    """
    parts: list[str] = []
    for cell in notebook.cells:
        header = "# %%" if cell.cell_type == "code" else "# %% [markdown]"
        if tags := tags_of(cell):
            header += f" tags={json.dumps(tags)}"
        lines: list[str] = cell.source.split("\n")
        if cell.cell_type != "code":
            lines = [f"# {line}" if line else "#" for line in lines]
        parts.append("\n".join([header, *lines]))
    return "\n\n".join(parts) + "\n"


def tags_of(cell: NotebookNode) -> list[str]:
    """Tags of a cell, an empty list where it has none."""
    return list(cell.metadata.get("tags", []))


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook as nbformat 4; refuses a file that is not one."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise Refusal(
            f"expected a notebook at {path}, but it cannot be read ({error}); "
            "write it again with `python -m darkmatter.book convert`"
        ) from error


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook in one stable form (one-space indent, sorted keys), in one step."""
    import nbformat

    nbformat.validate(notebook)
    write_text(
        path,
        json.dumps(_lines_split(notebook), indent=1, sort_keys=True, ensure_ascii=False) + "\n",
    )


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _lines_split(notebook: NotebookNode) -> Any:
    """The notebook as JSON data whose long strings are lists of lines, as Jupyter stores them."""
    from nbformat.v4.rwbase import split_lines, strip_transient

    return strip_transient(split_lines(json_copy(notebook)))


def json_copy(notebook: NotebookNode) -> NotebookNode:
    """A deep copy of a notebook (or any part of one)."""
    from nbformat import from_dict

    return cast("NotebookNode", from_dict(json.loads(json.dumps(notebook))))


def _split(text: str) -> list[tuple[int, str, list[str]]]:
    """(line number, header, body lines) of each cell."""
    found: list[tuple[int, str, list[str]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.startswith("# %%"):
            found.append((number, line, []))
        elif found:
            found[-1][2].append(line)
        elif line.strip():
            raise Refusal(
                f'line {number}: expected a cell header such as "# %% [markdown]" first, '
                f"found {line!r}; put a header above it"
            )
    return found


def _tags(text: str | None, number: int) -> list[str]:
    try:
        tags: Any = json.loads(text) if text else []
    except json.JSONDecodeError:
        tags = None
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):  # pyright: ignore[reportUnknownVariableType] - JSON is checked here
        raise Refusal(
            f'line {number}: expected tags as a JSON list such as tags=["solution"], '
            f"found {text}; correct the header"
        )
    return list(dict.fromkeys(str(tag) for tag in tags))  # pyright: ignore[reportUnknownVariableType] - checked above


def _uncommented(body: Sequence[str], number: int) -> str:
    lines = list(body)
    while lines and not lines[-1].strip():
        lines.pop()
    while lines and not lines[0].strip():
        lines.pop(0)
    if len(lines) >= 2 and lines[0].strip() in ('"""', 'r"""') and lines[-1].strip() == '"""':
        return "\n".join(lines[1:-1]).strip("\n")
    for offset, line in enumerate(lines):
        if line.strip() and not (line == "#" or line.startswith("# ")):
            raise Refusal(
                f'the markdown cell at line {number}: expected every line to begin with "# " '
                f'(or the whole cell between two lines of """), found {line!r} as line '
                f"{offset + 1} of it; prefix the line"
            )
    return "\n".join(line[2:] for line in lines)


def _setup(body: Sequence[str], number: int, repository: str | None) -> str:
    if any(line.strip() for line in body):
        raise Refusal(
            f"the setup cell at line {number}: expected no text, because it is filled in from "
            "_config.yml, found some; remove it"
        )
    if repository is None:
        raise Refusal(
            f"the setup cell at line {number}: expected the repository address from _config.yml, "
            "found none; pass repository="
        )
    return setup_cell(repository)
