"""Real text that every machine with this environment already has: Python docstrings.

A *document* is one module: its docstrings in source order, each under its qualified name.
Documents come from the standard library and from the installed packages under permissive
licences. Text is deduplicated before it is split, so that held-out documents share no long
paragraph with training documents.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PERMITTED = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|PSF|Python Software Foundation|HPND)\b", re.IGNORECASE
)
REFUSED = re.compile(r"GPL|MPL|Mozilla|GNU|EPL|CC-BY-NC|Proprietary", re.IGNORECASE)
SHORTEST_DOCSTRING = 60
"""Characters; shorter docstrings ("Return self.") teach a model nothing but boilerplate."""
SHORTEST_SHARED_PARAGRAPH = 100
"""Characters; a paragraph this long is kept only where it is seen first."""


@dataclass(frozen=True)
class Package:
    """One source of text: name, version, the licence as its metadata says it."""

    name: str
    version: str
    licence: str


@dataclass(frozen=True)
class Document:
    """The docstrings of one module."""

    name: str
    package: str
    text: str


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """The licence a distribution declares: SPDX expression, else classifiers, else first line."""
    metadata: Any = distribution.metadata
    if metadata.get("License-Expression"):
        return str(metadata["License-Expression"])
    classifiers = [
        c.split("::")[-1].strip()
        for c in metadata.get_all("Classifier") or []
        if c.startswith("License ::") and c.split("::")[-1].strip() != "OSI Approved"
    ]
    if classifiers:
        return "; ".join(classifiers)
    return next(iter((metadata.get("License") or "").splitlines()), "").strip()[:60]


def is_permitted(licence: str) -> bool:
    """True for PSF, BSD, MIT and Apache licences with no copyleft part."""
    return bool(PERMITTED.search(licence)) and not REFUSED.search(licence)


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a module's source, in source order.

    Raises SyntaxError where the source is not Python; the caller skips such files.
    """

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                text = ast.get_docstring(child)
                if text:
                    yield name, text
                yield from visit(child, f"{name}.")

    tree = ast.parse(source)
    text = ast.get_docstring(tree)
    if text:
        yield "", text
    yield from visit(tree, "")


def read_module(job: tuple[str, str, str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Read one file; files that are not UTF-8 Python yield nothing."""
    path, module, package = job
    try:
        found = list(docstrings(Path(path).read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError, OSError):
        found = []
    return module, package, found


def module_name(relative: Path) -> str:
    """Dotted module name of a file below an import root."""
    parts = list(relative.with_suffix("").parts)
    if parts and parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def sources(only: frozenset[str] | None = None) -> tuple[list[Package], list[tuple[str, str, str]]]:
    """List the packages whose text may be used and every file of theirs.

    `only` restricts to these distribution names ("python" is the standard library).
    """
    packages: list[Package] = []
    jobs: list[tuple[str, str, str]] = []
    if only is None or "python" in only:
        packages.append(Package("python", platform.python_version(), "PSF-2.0"))
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if relative.parts[0] not in {"site-packages", "test", "idlelib", "lib2to3"}:
                jobs.append((str(path), module_name(relative), "python"))
    distributions = {d.metadata["Name"].lower(): d for d in importlib.metadata.distributions()}
    for name in sorted(distributions):
        distribution = distributions[name]
        licence = licence_of(distribution)
        if (only is not None and name not in only) or not is_permitted(licence):
            continue
        files = sorted(
            str(f) for f in distribution.files or [] if f.suffix == ".py" and ".." not in f.parts
        )
        if files and name != "darkmatter-book":
            packages.append(Package(name, distribution.version, licence))
            for file in files:
                path = Path(str(distribution.locate_file(file)))
                jobs.append((str(path), module_name(Path(file)), name))
    return packages, jobs


def deduplicate(
    modules: Iterable[tuple[str, str, list[tuple[str, str]]]],
) -> Iterator[Document]:
    """Turn modules into documents, keeping each docstring and each long paragraph once.

    "Once" is over the whole corpus and up to white space, in the order given.
    """
    seen: set[bytes] = set()

    def is_new(text: str) -> bool:
        key = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=12).digest()
        if key in seen:
            return False
        seen.add(key)
        return True

    for module, package, found in modules:
        sections: list[str] = []
        for name, text in found:
            if len(text) < SHORTEST_DOCSTRING or "\x00" in text:
                continue
            paragraphs = [
                p
                for p in re.split(r"\n\s*\n", text)
                if len(p) < SHORTEST_SHARED_PARAGRAPH or is_new(p)
            ]
            body = "\n\n".join(paragraphs).strip()
            if len(body) >= SHORTEST_DOCSTRING and is_new(body):
                sections.append(f"{module}.{name}".rstrip(".") + f"\n\n{body}")
        if sections:
            yield Document(module, package, "\n\n".join(sections) + "\n")


def collect(
    only: frozenset[str] | None = None, processes: int = 2
) -> tuple[list[Package], list[Document]]:
    """Read every permitted docstring of this environment into deduplicated documents."""
    packages, jobs = sources(only)
    if processes == 1:
        documents = list(deduplicate(map(read_module, jobs)))
    else:
        with ProcessPoolExecutor(processes) as pool:
            documents = list(deduplicate(pool.map(read_module, jobs, chunksize=64)))
    used = {d.package for d in documents}
    return [p for p in packages if p.name in used], documents


def split_of(document: Document, held_out: float = 0.1) -> str:
    """ "train", "fit" or "test", by a hash of the document's name, so that it never moves.

    A share `held_out` of the documents is never trained on; 60 % of it is "fit", 40 % "test".
    """
    digest = hashlib.sha256(document.name.encode()).digest()
    where = int.from_bytes(digest[:8], "big") / 2**64
    if where >= held_out:
        return "train"
    return "fit" if where < 0.6 * held_out else "test"
