"""Filters as text.

    language:en AND (category:music OR creator:42) AND NOT category:pop

NOT binds tighter than AND, AND tighter than OR; `!`, `&`, `|` mean the same; parentheses group.
`feature:value` holds for an item that has this value among the feature's values, and
`feature IN [a, b]` for one that has any of them. Names and values with other characters than
letters, digits and `_ - . / + @ # % *` are quoted. The empty text (and ALL) is everything, NONE is
nothing. `parse_filter(str(tree)) == tree`.
"""

import functools
import re
from collections.abc import Collection
from typing import NamedTuple

from jaxrec.parse_errors import caret_message, unknown_name
from jaxrec.retrieval.filters import (
    KEYWORDS,
    WORD,
    Everything,
    Filter,
    FilterError,
    Nothing,
    Term,
    all_of,
    any_of,
    negate,
    terms_of,
)

type FilterLike = str | Filter | None

_TOKEN = re.compile(
    rf"""(?P<space>\s+) | (?P<word>{WORD}) | (?P<symbol>&&?|\|\|?|[!()\[\],:])
    | "(?P<double>(?:[^"\\]|\\.)*)" | '(?P<single>(?:[^'\\]|\\.)*)'""",
    re.VERBOSE | re.DOTALL,
)
_OPERATORS = {"&": "AND", "&&": "AND", "|": "OR", "||": "OR", "!": "NOT"}


class Token(NamedTuple):
    """kind: "text" (a word or a quoted string), "end", or the keyword or symbol itself."""

    kind: str
    text: str
    start: int
    end: int


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
            is_keyword = value.upper() in KEYWORDS and text[at : at + 1] != ":"
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
    return FilterError(caret_message(text, at, what, expected))


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
            raise _error(self.text, name.start, *unknown_name(name.text, self.features, "feature"))
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
        if token.kind != "text" and token.text.upper() not in KEYWORDS:
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


def to_tree(filter: FilterLike, features: Collection[str]) -> Filter:
    """The tree of a filter given as text, as a tree or as None for everything.

    Raises:
      FilterError: as `parse_filter`; for an unknown feature also the known ones.
    """
    if filter is None:
        return Everything()
    if isinstance(filter, str):
        return parse_filter(filter, features=features)
    if not isinstance(filter, Filter):
        raise FilterError(f"a filter is a text, a tree or None, not {filter!r}")
    for term in terms_of(filter):
        if term.feature not in features:
            raise FilterError("; expected ".join(unknown_name(term.feature, features, "feature")))
    return filter
