"""Relations between recorded values, written as text and evaluated without `eval`.

    chain := sum (("<" | "<=" | ">" | ">=") sum)+ ("and" chain)?
    sum   := term ((" + " | " - ") term)*      term := atom (("*" | "/") atom)*
    atom  := number | id | id "[" integer "]" | "-" atom | "(" sum ")"

An id is kebab-case, so a minus sign between two values needs a space on both sides.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from darkmatter._refusal import Refusal

Value = float | bool | list[float]

# Longer ones could nest deeper than Python's stack; the longest of the book has a fifth of it.
_LONGEST = 200

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)(?![a-z0-9-])"
    r"|(?P<and>and)(?![a-z0-9-])"
    r"|(?P<id>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)"
    r"|(?P<symbol><=|>=|[<>()\[\]*/+-]))"
)
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str


class NotRecorded(LookupError):
    """A relation speaks of a value that no chapter recorded."""


def ids_of(relation: str) -> list[str]:
    """The ids a relation speaks of, in order of appearance."""
    return list(dict.fromkeys(token.text for token in _tokens(relation) if token.kind == "id"))


def validate(relation: str) -> None:
    """Raise `Refusal` if the text is not a relation."""
    _Reader(relation, None).chain()


def holds(relation: str, values: Mapping[str, Value]) -> bool:
    """Whether a relation is true of the recorded values.

    Raises `NotRecorded` naming the first id that has no value, `Refusal` if the text is not a
    relation or compares a list without an index.
    """
    return _Reader(relation, values).chain()


def _tokens(relation: str) -> list[_Token]:
    found: list[_Token] = []
    position = 0
    text = relation.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise Refusal(
                f"expected a relation such as 'a < b < 0.5' over recorded ids, found "
                f"{text[position : position + 12]!r} in {relation[:80]!r}; correct the relation"
            )
        found.append(_Token(match.lastgroup, match[match.lastgroup]))
        position = match.end()
    if len(found) > _LONGEST:
        raise Refusal(
            f"expected a relation of at most {_LONGEST} words and signs, found {len(found)}, which "
            f"begin with {relation[:40]!r}; write a shorter one"
        )
    return found


class _Reader:
    """Recursive descent; without values it only checks the form."""

    def __init__(self, relation: str, values: Mapping[str, Value] | None) -> None:
        self._relation = relation
        self._values = values
        self._rest = _tokens(relation)

    def chain(self) -> bool:
        left = self._sum()
        result = True
        compared = False
        while self._next_is(*_COMPARE):
            compare = _COMPARE[self._rest.pop(0).text]
            right = self._sum()
            result = compare(left, right) and result
            left, compared = right, True
        if not compared:
            raise self._refusal("a comparison (<, <=, > or >=)")
        if self._rest and self._rest[0].kind == "and":
            self._rest.pop(0)
            return self.chain() and result
        if self._rest:
            raise self._refusal("the end of the relation")
        return result

    def _sum(self) -> float:
        total = self._term()
        while self._next_is("+", "-"):
            sign = 1.0 if self._rest.pop(0).text == "+" else -1.0
            total += sign * self._term()
        return total

    def _term(self) -> float:
        product = self._atom()
        while self._next_is("*", "/"):
            divide = self._rest.pop(0).text == "/"
            factor = self._atom()
            if divide and factor == 0.0:
                raise Refusal(
                    f"expected a divisor other than zero in {self._relation!r}, found zero; "
                    "write the relation without the division"
                )
            product = product / factor if divide else product * factor
        return product

    def _atom(self) -> float:
        if not self._rest:
            raise self._refusal("a number or an id")
        token = self._rest.pop(0)
        if token.kind == "number":
            return float(token.text)
        if token.kind == "id":
            return self._value(token.text)
        if token.text == "-":
            return -self._atom()
        if token.text == "(":
            inside = self._sum()
            if not self._next_is(")"):
                raise self._refusal("a closing bracket")
            self._rest.pop(0)
            return inside
        self._rest.insert(0, token)
        raise self._refusal("a number or an id")

    def _value(self, name: str) -> float:
        index: int | None = None
        if self._next_is("["):
            self._rest.pop(0)
            negative = self._next_is("-")
            if negative:
                self._rest.pop(0)
            if not self._rest or not self._rest[0].text.isdigit():
                raise self._refusal("a whole number as index")
            index = int(self._rest.pop(0).text) * (-1 if negative else 1)
            if not self._next_is("]"):
                raise self._refusal("a closing square bracket")
            self._rest.pop(0)
        if self._values is None:
            return 1.0
        if name not in self._values:
            raise NotRecorded(name)
        value = self._values[name]
        if isinstance(value, list) != (index is not None):
            raise Refusal(
                f"the relation {self._relation!r}: expected an index exactly where the value is a "
                f"list, found {name} = {value}; write {name}[0] for a list, {name} for a number"
            )
        if isinstance(value, list):
            if not -len(value) <= (index or 0) < len(value):
                raise Refusal(
                    f"the relation {self._relation!r}: expected an index inside the {len(value)} "
                    f"values of {name}, found {index}; correct the index"
                )
            return value[index or 0]
        return float(value)

    def _next_is(self, *symbols: str) -> bool:
        return bool(self._rest) and self._rest[0].kind == "symbol" and self._rest[0].text in symbols

    def _refusal(self, expected: str) -> Refusal:
        found = self._rest[0].text if self._rest else "the end"
        return Refusal(
            f"expected {expected} in the relation {self._relation!r}, found {found!r}; "
            "correct the relation (a minus sign needs a space on both sides)"
        )
