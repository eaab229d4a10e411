"""YAML of the book, read without trust: what is wrong with a file is one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from reprlib import Repr
from typing import Any

from darkmatter._refusal import Refusal

# Half of a character that UTF-8 cannot write.
_SURROGATE = re.compile(r"\\(u|U0000)[dD][89a-fA-F]")
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file, plain data only.

    Raises Refusal, naming the file, when there is none or it is not YAML. `what` it should be.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if found := _SURROGATE.search(text):
            raise ValueError(f"{found[0]}.. is no character")
        return yaml.safe_load(text)
    except FileNotFoundError as error:
        raise Refusal(f"expected {what} at {path}, found no file; create it") from error
    except (
        # Of PyYAML's constructors, for a date, a number or a truth value that is none.
        *(yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
        *(OSError, RecursionError),
    ) as error:
        told = " ".join(str(error).split())[:300]
        raise Refusal(f"expected YAML in {path}, found an error ({told}); correct it") from error


def shown(value: object) -> str:
    """A value of a file for a message: cut short, as aliases make small files large."""
    return _SHORT.repr(value)
