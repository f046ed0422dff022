"""Filters over item attributes: the expression tree and its Python builder.

    (F("language") == "en") & (F("category").isin(["music"]) | (F("creator") == 42))

Trees are normalised as they are built: nested ANDs and ORs are one n-ary node, double negations and
constants vanish; equal trees compare equal. `filter_text` reads and writes them as text.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_DEPTH = 100
MAX_TERMS = 100_000
WORD = r"[\w\-./+@#%*]+"
"""What needs no quotes in a filter's text."""
KEYWORDS = frozenset({"AND", "OR", "NOT", "IN", "ALL", "NONE"})


class FilterError(ValueError):
    """A filter that cannot be understood; the message shows the place and what was expected."""


def value_text(value: Any) -> str:
    """The one text form of an attribute value: 42 and "42" are the same value."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(int(value))
    hint = "; write None for a missing value" if value is None or value != value else ""
    raise FilterError(f"a filter value is a string or an integer, not {value!r}{hint}")


class Filter:
    """A node of the tree; combine with `&`, `|` and `~`."""

    depth: int
    num_terms: int

    def __and__(self, other: "Filter") -> "Filter":
        return all_of((self, other))

    def __or__(self, other: "Filter") -> "Filter":
        return any_of((self, other))

    def __invert__(self) -> "Filter":
        return negate(self)

    def __bool__(self) -> bool:
        raise FilterError("a filter has no truth value: combine filters with &, | and ~")


@dataclass(frozen=True)
class Everything(Filter):
    """Every item."""

    depth = num_terms = 0

    def __str__(self) -> str:
        return "ALL"


@dataclass(frozen=True)
class Nothing(Filter):
    """No item."""

    depth = num_terms = 0

    def __str__(self) -> str:
        return "NONE"


@dataclass(frozen=True)
class Term(Filter):
    """Items that have `value` among the values of `feature`."""

    feature: str
    value: str
    depth = 0
    num_terms = 1

    def __str__(self) -> str:
        return f"{_quoted(self.feature)}:{_quoted(self.value)}"


@dataclass(frozen=True)
class Not(Filter):
    """Items that `operand` rejects."""

    operand: Filter
    depth: int = field(init=False, compare=False, repr=False)
    num_terms: int = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        _record_size(self, (self.operand,))

    def __str__(self) -> str:
        return "NOT " + _grouped(self.operand, And | Or)


@dataclass(frozen=True)
class And(Filter):
    """Items that every operand accepts."""

    operands: tuple[Filter, ...]
    depth: int = field(init=False, compare=False, repr=False)
    num_terms: int = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        _record_size(self, self.operands)

    def __str__(self) -> str:
        return " AND ".join(_grouped(operand, Or) for operand in self.operands)


@dataclass(frozen=True)
class Or(Filter):
    """Items that some operand accepts."""

    operands: tuple[Filter, ...]
    depth: int = field(init=False, compare=False, repr=False)
    num_terms: int = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        _record_size(self, self.operands)

    def __str__(self) -> str:
        return " OR ".join(map(str, self.operands))


def _quoted(text: str) -> str:
    if re.fullmatch(WORD, text) and text.upper() not in KEYWORDS:
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _grouped(operand: Filter, kinds) -> str:
    return f"({operand})" if isinstance(operand, kinds) else str(operand)


def _record_size(node: Filter, operands: Sequence[Filter]) -> None:
    """Sets the node's depth and term count; both are limited so that no later walk can fail."""
    depth = 1 + max(operand.depth for operand in operands)
    num_terms = sum(operand.num_terms for operand in operands)
    if depth > MAX_DEPTH:
        raise FilterError(
            f"the filter nests AND, OR and NOT more than {MAX_DEPTH} levels deep; "
            "write it flatter (feature IN [..] replaces a chain of ORs)"
        )
    if num_terms > MAX_TERMS:
        raise FilterError(f"the filter has {num_terms} terms, more than the limit of {MAX_TERMS}")
    object.__setattr__(node, "depth", depth)
    object.__setattr__(node, "num_terms", num_terms)


def negate(operand: Filter) -> Filter:
    """NOT, without double negations or negated constants."""
    match operand:
        case Not(inner):
            return inner
        case Everything():
            return Nothing()
        case Nothing():
            return Everything()
    return Not(operand)


def all_of(operands: Iterable[Filter]) -> Filter:
    """AND of any number of filters; of none, everything."""
    return _combine(And, operands, neutral=Everything(), absorbing=Nothing())


def any_of(operands: Iterable[Filter]) -> Filter:
    """OR of any number of filters; of none, nothing."""
    return _combine(Or, operands, neutral=Nothing(), absorbing=Everything())


def _combine(kind: type[And] | type[Or], operands, *, neutral: Filter, absorbing: Filter) -> Filter:
    flat: list[Filter] = []
    for operand in operands:
        if not isinstance(operand, Filter):
            raise FilterError(f"a filter combines with filters only, not with {operand!r}")
        if operand == absorbing:
            return absorbing
        if isinstance(operand, kind):
            flat.extend(operand.operands)
        elif operand != neutral:
            flat.append(operand)
    if not flat:
        return neutral
    return flat[0] if len(flat) == 1 else kind(tuple(flat))


def terms_of(tree: Filter) -> list[Term]:
    """All terms of a tree, from left to right."""
    match tree:
        case Term():
            return [tree]
        case Not(operand):
            return terms_of(operand)
        case And(operands) | Or(operands):
            return [term for operand in operands for term in terms_of(operand)]
    return []


def rejecting_part(tree: Filter, holds: Callable[[Term], bool]) -> Filter | None:
    """None if the item passes, else the part to blame: of an AND its first such operand."""
    match tree:
        case Everything():
            return None
        case Term():
            return None if holds(tree) else tree
        case Not(operand):
            return tree if rejecting_part(operand, holds) is None else None
        case And(operands):
            return next((r for o in operands if (r := rejecting_part(o, holds)) is not None), None)
        case Or(operands):
            return None if any(rejecting_part(o, holds) is None for o in operands) else tree
    return tree


class F:
    """A feature, for building filters: `(F("language") == "en") & ~F("category").isin(["pop"])`."""

    __hash__ = None  # type: ignore[assignment]  # == builds a filter

    def __init__(self, feature: str):
        self.feature = feature

    def __eq__(self, value: Any) -> Filter:  # type: ignore[override]
        return Term(self.feature, value_text(value))

    def __ne__(self, value: Any) -> Filter:  # type: ignore[override]
        return negate(self == value)

    def isin(self, values: Iterable[Any]) -> Filter:
        """Items that have any of `values`; of no values, nothing."""
        return any_of([self == value for value in values])
