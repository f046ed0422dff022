"""Filters over item attributes: the expression tree, its text form and its Python builder.

    language:en AND (category:music OR creator:42) AND NOT category:pop
    F("language") == "en" & ...                           # the same tree, built in Python

NOT binds tighter than AND, AND tighter than OR; `!`, `&`, `|` mean the same; parentheses group.
`feature:value` holds for an item that has this value among the feature's values, and
`feature IN [a, b]` for one that has any of them. Names and values with other characters than
letters, digits and `_ - . / + @ # % *` are quoted. The empty text (and ALL) is everything, NONE is
nothing. Trees are normalised as they are built: nested ANDs and ORs are one n-ary node, double
negations and constants vanish; so `parse_filter(str(f)) == f`.
"""

import difflib
import functools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

MAX_DEPTH = 100
MAX_TERMS = 100_000


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
    raise FilterError(f"a filter value is a string or an integer, not {value!r}")


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


# --------------------------------------------------------------------------------- text → tokens

_WORD = r"[\w\-./+@#%*]+"
_TOKEN = re.compile(
    rf"""(?P<space>\s+) | (?P<word>{_WORD}) | (?P<symbol>&&?|\|\|?|[!()\[\],:])
    | "(?P<double>(?:[^"\\]|\\.)*)" | '(?P<single>(?:[^'\\]|\\.)*)'""",
    re.VERBOSE | re.DOTALL,
)
_OPERATORS = {"&": "AND", "&&": "AND", "|": "OR", "||": "OR", "!": "NOT"}
_KEYWORDS = {"AND", "OR", "NOT", "IN", "ALL", "NONE"}


class Token(NamedTuple):
    """kind: "text" (a word or a quoted string), "end", or the keyword or symbol itself."""

    kind: str
    text: str
    start: int
    end: int


def _quoted(text: str) -> str:
    if re.fullmatch(_WORD, text) and text.upper() not in _KEYWORDS:
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _tokens(text: str) -> list[Token]:
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            if text[at] in "\"'":
                raise _error(text, at, "the quote opened here is never closed", "a closing quote")
            raise _error(text, at, f"found {text[at]!r}", "a name, a quoted string or an operator")
        kind, value, start, at = match.lastgroup, match[match.lastgroup or 0], at, match.end()
        if kind == "word":
            # A keyword right before a colon is the name of a feature.
            is_keyword = value.upper() in _KEYWORDS and text[at : at + 1] != ":"
            kind = value.upper() if is_keyword else "text"
        elif kind == "symbol":
            kind = _OPERATORS.get(value, value)
        elif kind != "space":
            kind, value = "text", re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)
        if kind != "space":
            tokens.append(Token(kind or "", value, start, at))
    tokens.append(Token("end", "", len(text), len(text)))
    return tokens


def _error(text: str, at: int, what: str, expected: str) -> FilterError:
    """The message with the part of the text around column `at` and a caret under the column."""
    begin, end = max(0, at - 60), at + 40
    shown = re.sub(r"\s", " ", text[begin:end])
    left, right = "…" if begin else "", "…" if end < len(text) else ""
    caret = " " * (at - begin + len(left)) + "^"
    return FilterError(
        f"column {at + 1}: {what}; expected {expected}\n  {left}{shown}{right}\n  {caret}"
    )


# ----------------------------------------------------------------------------------- tokens → tree

_BINDING = {"OR": 1, "AND": 2, "NOT": 3}
_OPERAND = "a term like feature:value, NOT or '('"


class _Parser:
    """Operator-precedence parsing with explicit stacks, so nesting cannot exhaust Python's own."""

    def __init__(self, text: str, features: Collection[str] | None):
        self.text, self.features = text, features
        self.tokens, self.at = _tokens(text), 0
        self.operators: list[Token] = []
        self.operands: list[Filter] = []

    def fail(self, token: Token, expected: str) -> FilterError:
        found = "found the end" if token.kind == "end" else f"found {token.text!r}"
        return _error(self.text, token.start, found, expected)

    def next(self) -> Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, kind: str, expected: str) -> Token:
        token = self.next()
        if token.kind != kind:
            raise self.fail(token, expected)
        return token

    def parse(self) -> Filter:
        if self.tokens[0].kind == "end":
            return Everything()
        while True:
            self.operand()
            while (token := self.next()).kind == ")":
                self.close(token)
            if token.kind == "end":
                break
            if token.kind not in ("AND", "OR"):
                raise self.fail(token, "AND, OR, ')' or the end")
            self.reduce(_BINDING[token.kind])
            self.operators.append(token)
        self.reduce(0)
        if self.operators:
            opened = self.operators[-1]
            raise _error(self.text, opened.start, "this parenthesis is never closed", "')'")
        return self.operands.pop()

    def operand(self) -> None:
        """Reads opening parentheses, NOTs and the term behind them."""
        while (token := self.next()).kind in ("(", "NOT"):
            self.operators.append(token)
        if token.kind in ("ALL", "NONE"):
            self.operands.append(Everything() if token.kind == "ALL" else Nothing())
        elif token.kind == "text":
            self.operands.append(self.term(token))
        else:
            raise self.fail(token, _OPERAND)

    def term(self, name: Token) -> Filter:
        if self.features is not None and name.text not in self.features:
            raise _error(self.text, name.start, *unknown_feature(name.text, self.features))
        separator = self.next()
        if separator.kind == "IN":
            self.expect("[", "'[' and a list of values")
            return any_of(self.values(name.text))
        if separator.kind != ":":
            raise self.fail(separator, f"':' and a value, or IN [..], after feature {name.text!r}")
        return Term(name.text, self.value().text)

    def value(self) -> Token:
        token = self.next()
        # After a colon or inside a list, a word that is a keyword elsewhere can only be a value.
        if token.kind != "text" and token.text.upper() not in _KEYWORDS:
            raise self.fail(token, "a value (quote values that hold spaces or symbols)")
        return token

    def values(self, feature: str) -> list[Term]:
        if self.tokens[self.at].kind == "]":
            self.at += 1
            return []
        terms = [Term(feature, self.value().text)]
        while (token := self.next()).kind == ",":
            terms.append(Term(feature, self.value().text))
        if token.kind != "]":
            raise self.fail(token, "',' or ']'")
        return terms

    def close(self, token: Token) -> None:
        self.reduce(0)
        if not self.operators:
            raise _error(self.text, token.start, "this parenthesis was never opened", "AND or OR")
        self.operators.pop()
        # A group is one operand: apply the NOTs in front of it.
        self.reduce(_BINDING["AND"])

    def reduce(self, binding: int) -> None:
        """Applies the pending operators that bind tighter than `binding`."""
        while self.operators and _BINDING.get(self.operators[-1].kind, 0) > binding:
            kind = self.operators.pop().kind
            if kind == "NOT":
                self.operands.append(negate(self.operands.pop()))
                continue
            # The whole run a AND b AND c at once: pairwise joins would copy n²/2 operands.
            run = [self.operands.pop()]
            while self.operators and self.operators[-1].kind == kind:
                self.operators.pop()
                run.append(self.operands.pop())
            run.append(self.operands.pop())
            combine = all_of if kind == "AND" else any_of
            self.operands.append(combine(reversed(run)))


def unknown_feature(name: str, features: Collection[str]) -> tuple[str, str]:
    """What was found and what was expected, with the closest known name first."""
    close = difflib.get_close_matches(name, features, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown feature {name!r}{hint}", "one of " + ", ".join(sorted(features))


@functools.lru_cache(maxsize=4096)
def _parse_cached(text: str, features: frozenset[str] | None) -> Filter:
    return _Parser(text, features).parse()


def parse_filter(text: str, *, features: Collection[str] | None = None) -> Filter:
    """The tree of a filter text.

    Args:
      text: the filter; see the module's docstring for the language.
      features: the known feature names; None accepts any name.

    Raises:
      FilterError: with the column, what was found there and what was expected; also for more than
        `MAX_DEPTH` levels of alternating AND, OR and NOT or more than `MAX_TERMS` terms.

    Cost: linear in the text; trees are cached by text.
    """
    return _parse_cached(text, None if features is None else frozenset(features))
