"""The formula language of value models: text or JSON to a checked, typed expression tree.

    0.7 * click + 0.3 * log(1 + like)
    click * (2 if age_hours < 24 and not seen > 0 else 1) / max(price, 1)

Numbers, names, `+ - * / **`, unary minus; `< <= > >= == !=`; `and or not`; `a if condition else b`
and `if(condition, a, b)`; the functions of `FUNCTIONS`. Precedence is Python's:
conditional < or < and < not < comparison < sum < product < unary < power. Comparisons do not chain.
Numbers and conditions are different types: `if(click, 1, 0)` is an error.

In JSON a number or true/false is itself, a name is a string, everything else an object with one
key: {"*": [2, {"if": [{">": ["click", 0.5]}, "like", 0]}]}.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxrec.parse_errors import caret_message, unknown_name

MAX_DEPTH = 100
"""Levels of the tree at most, so that walking it cannot exhaust Python's stack."""

type Kind = Literal["number", "condition"]


class FormulaError(ValueError):
    """A formula that cannot be understood; the message shows the place and what was expected."""


class Signature(NamedTuple):
    """Kinds of an operation's operands and of its result; `more` operands like the last may follow.

    `if` takes two of either kind; it is checked on its own.
    """

    operands: tuple[Kind, ...]
    result: Kind
    more: bool = False


_N, _C = "number", "condition"
FUNCTIONS: Mapping[str, Signature] = {
    "min": Signature((_N, _N), _N, more=True),
    "max": Signature((_N, _N), _N, more=True),
    "clip": Signature((_N, _N, _N), _N),
    "pow": Signature((_N, _N), _N),
    "abs": Signature((_N,), _N),
    "exp": Signature((_N,), _N),
    "log": Signature((_N,), _N),
    "sqrt": Signature((_N,), _N),
    "sigmoid": Signature((_N,), _N),
    "if": Signature((_C, _N, _N), _N),
}
"""Functions by name; clip(x, low, high)."""

_BINARY = {
    "or": (2, Signature((_C, _C), _C)),
    "and": (3, Signature((_C, _C), _C)),
    **{op: (5, Signature((_N, _N), _C)) for op in ("<", "<=", ">", ">=", "==", "!=")},
    **{op: (6, Signature((_N, _N), _N)) for op in ("+", "-")},
    **{op: (7, Signature((_N, _N), _N)) for op in ("*", "/")},
    "**": (9, Signature((_N, _N), _N)),
}
_CONDITIONAL, _NOT, _COMPARISON, _UNARY, _POWER, _ATOM = 1, 4, 5, 8, 9, 10
_PREFIX = {"not": (_NOT, Signature((_C,), _C)), "neg": (_UNARY, Signature((_N,), _N))}
_WORDS = {"and", "or", "not", "if", "else", "true", "false"}


def signature(op: str) -> Signature:
    """The signature of an operator or function."""
    if op in _BINARY:
        return _BINARY[op][1]
    return _PREFIX[op][1] if op in _PREFIX else FUNCTIONS[op]


# ------------------------------------------------------------------------------------------- tree


@dataclass(frozen=True)
class Constant:
    """A number, or true or false."""

    value: float | bool
    depth = 1

    @property
    def kind(self) -> Kind:
        """What the value is."""
        return "condition" if isinstance(self.value, bool) else "number"

    def __str__(self) -> str:
        if isinstance(self.value, bool):
            return str(self.value).lower()
        return str(int(self.value)) if self.value == int(self.value) < 1e15 else repr(self.value)


@dataclass(frozen=True)
class Name:
    """A task's score or an item's feature."""

    name: str
    kind: Kind = field(default="number", init=False)
    depth = 1

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Apply:
    """An operator or function and its operands; `-x` is the operator "neg", `pow` is `**`."""

    op: str
    args: "tuple[Expression, ...]"
    kind: Kind = field(compare=False)
    depth: int = field(compare=False, repr=False)

    def __str__(self) -> str:
        if self.op in _BINARY:
            binding = _BINARY[self.op][0]
            # Left-associative but for **, whose right side may also start with a minus.
            left = binding + (self.op == "**" or binding == _COMPARISON)
            right = _UNARY if self.op == "**" else binding + 1
            sides = [_grouped(self.args[0], left), _grouped(self.args[1], right)]
            return f" {self.op} ".join(sides)
        if self.op == "neg":
            return "-" + _grouped(self.args[0], _UNARY)
        if self.op == "not":
            return "not " + _grouped(self.args[0], _NOT)
        return f"{self.op}({', '.join(map(str, self.args))})"


type Expression = Constant | Name | Apply


def _binding(node: Expression) -> int:
    if isinstance(node, Apply):
        return _BINARY.get(node.op, _PREFIX.get(node.op, (_ATOM, None)))[0]
    return _UNARY if str(node).startswith("-") else _ATOM


def _grouped(node: Expression, least: int) -> str:
    return str(node) if _binding(node) >= least else f"({node})"


def names_in(tree: Expression) -> set[str]:
    """The names that a tree reads."""
    if isinstance(tree, Apply):
        return set().union(*[names_in(arg) for arg in tree.args])
    return {tree.name} if isinstance(tree, Name) else set()


class _CheckError(Exception):
    """What is wrong with an operation and which of its operands is to blame (None: all)."""

    def __init__(self, what: str, expected: str, operand: int | None = None):
        self.what, self.expected, self.operand = what, expected, operand


def _apply(op: str, args: "list[Expression]") -> Apply:
    """The checked node."""
    op = "**" if op == "pow" else op
    operands, result, more = signature(op)
    if len(args) < len(operands) or (len(args) > len(operands) and not more):
        count = f"{len(operands)}{' or more' if more else ''}"
        raise _CheckError(f"{op} got {len(args)} operands", f"{count} operands")
    if op == "if":
        result = args[1].kind
        operands = ("condition", result, result)
    for place, arg in enumerate(args):
        wanted = operands[min(place, len(operands) - 1)]
        if arg.kind != wanted:
            hint = {
                "condition": "a condition, such as x > 0",
                "number": "a number (if(condition, 1, 0) makes one of a condition)",
            }
            raise _CheckError(f"{op} got a {arg.kind} here", hint[wanted], place)
    depth = 1 + max(arg.depth for arg in args)
    if depth > MAX_DEPTH:
        raise _CheckError(f"more than {MAX_DEPTH} levels of operations", "a flatter formula")
    return Apply(op, tuple(args), result, depth)


# -------------------------------------------------------------------------------------------- JSON


def to_json(tree: Expression) -> Any:
    """The tree in its JSON form."""
    if isinstance(tree, Constant):
        return tree.value
    if isinstance(tree, Name):
        return tree.name
    return {tree.op: [to_json(arg) for arg in tree.args]}


def from_json(data: Any, names: Collection[str], path: str = "formula") -> Expression:
    """The tree of a JSON form.

    Raises:
      FormulaError: with the path to the part that is wrong.
    """

    def fail(what: str, expected: str, at: str = path) -> FormulaError:
        return FormulaError(f"{at}: {what}; expected {expected}")

    if path.count(".") > MAX_DEPTH:
        raise fail(f"more than {MAX_DEPTH} levels of operations", "a flatter formula")
    if isinstance(data, bool):
        return Constant(data)
    if isinstance(data, int | float):
        if not abs(data) <= _LARGEST:
            raise fail(f"found {data}", f"a number between ±{_LARGEST:g}")
        return Constant(float(data))
    if isinstance(data, str):
        if data not in names:
            raise fail(*unknown_name(data, names))
        return Name(data)
    if not isinstance(data, dict) or len(data) != 1:
        raise fail(f"found {data!r}", 'a number, a name or an object with one key, as {"+": [..]}')
    (op, args), *_ = data.items()
    known = {*_BINARY, *_PREFIX, *FUNCTIONS}
    if op not in known:
        raise fail(*unknown_name(str(op), known, "operation"))
    if not isinstance(args, list):
        raise fail(f"found {args!r}", "a list of operands", f"{path}.{op}")
    parts = [from_json(arg, names, f"{path}.{op}[{i}]") for i, arg in enumerate(args)]
    try:
        return _apply(op, parts)
    except _CheckError as error:
        at = f"{path}.{op}" + ("" if error.operand is None else f"[{error.operand}]")
        raise fail(error.what, error.expected, at) from None


# -------------------------------------------------------------------------------------------- text

_LARGEST = 3.4e38
_TOKEN = re.compile(
    r"""(?P<space>\s+) | (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?) | (?P<word>[^\W\d]\w*)
    | (?P<symbol>\*\*|<=|>=|==|!=|[-+*/<>(),])""",
    re.VERBOSE,
)
_HINTS = {"=": "== for equality", "^": "** for powers", "&": "and", "|": "or", "!": "not"}


class Token(NamedTuple):
    """kind: "number", "name", "end", or the keyword or symbol itself."""

    kind: str
    text: str
    start: int


def _error(text: str, at: int, what: str, expected: str) -> FormulaError:
    return FormulaError(caret_message(text, at, what, expected))


def _tokens(text: str) -> list[Token]:
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            wanted = _HINTS.get(text[at], "a number, a name or an operator")
            raise _error(text, at, f"found {text[at]!r}", wanted)
        kind, value = match.lastgroup or "", match[0]
        if kind == "word":
            kind = value.lower() if value.lower() in _WORDS else "name"
        if kind == "symbol":
            kind = value
        if kind != "space":
            tokens.append(Token(kind, value, at))
        at = match.end()
    return [*tokens, Token("end", "", len(text))]


class _Parser:
    """Precedence climbing: `expression(least)` reads operators that bind at least that tightly."""

    def __init__(self, text: str, names: Collection[str]):
        self.text, self.names = text, names
        self.tokens, self.at, self.nesting = _tokens(text), 0, 0

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def fail(self, token: Token, expected: str) -> FormulaError:
        found = "found the end" if token.kind == "end" else f"found {token.text!r}"
        return _error(self.text, token.start, found, expected)

    def take(self, kind: str, expected: str) -> Token:
        token = self.token
        if token.kind != kind:
            raise self.fail(token, expected)
        self.at += 1
        return token

    def node(self, op: str, args: list[tuple[Expression, int]], at: int) -> tuple[Expression, int]:
        """The checked operation; `at` is where the operator stands. Nodes go with their start."""
        try:
            return _apply(op, [arg for arg, _ in args]), min(at, *[start for _, start in args])
        except _CheckError as error:
            place = at if error.operand is None else args[error.operand][1]
            raise _error(self.text, place, error.what, error.expected) from None

    def parse(self) -> Expression:
        tree, _ = self.expression(_CONDITIONAL)
        if self.token.kind != "end":
            raise self.fail(self.token, "an operator or the end")
        return tree

    def expression(self, least: int) -> tuple[Expression, int]:
        self.nesting += 1
        if self.nesting > MAX_DEPTH:
            what = f"more than {MAX_DEPTH} levels of nesting"
            raise _error(self.text, self.token.start, what, "a flatter formula")
        left = self.operand()
        while (binding := self.binding(self.token)) >= least:
            left = self.joined(left, binding)
        self.nesting -= 1
        return left

    @staticmethod
    def binding(token: Token) -> int:
        return _CONDITIONAL if token.kind == "if" else _BINARY.get(token.kind, (0, None))[0]

    def joined(self, left: tuple[Expression, int], binding: int) -> tuple[Expression, int]:
        """`left`, the operator that follows it, and its right side."""
        token = self.token
        self.at += 1
        if binding == _CONDITIONAL:
            condition = self.expression(_CONDITIONAL + 1)
            self.take("else", "else, as in a if condition else b")
            return self.node("if", [condition, left, self.expression(_CONDITIONAL)], token.start)
        right = self.expression(_UNARY if binding == _POWER else binding + 1)
        if binding == _COMPARISON and self.binding(self.token) == _COMPARISON:
            raise _error(self.text, self.token.start, "comparisons do not chain", "a < b and b < c")
        return self.node(token.kind, [left, right], token.start)

    def operand(self) -> tuple[Expression, int]:
        token = self.token
        self.at += 1
        match token.kind:
            case "number":
                if not float(token.text) <= _LARGEST:
                    raise self.fail(token, f"a number up to {_LARGEST:g}")
                return Constant(float(token.text)), token.start
            case "true" | "false":
                return Constant(token.kind == "true"), token.start
            case "(":
                inner = self.expression(_CONDITIONAL)
                self.take(")", "')' or an operator")
                return inner[0], token.start
            case "-":
                return self.negated(self.expression(_UNARY), token.start)
            case "not":
                return self.node("not", [self.expression(_NOT)], token.start)
            case "name" | "if":
                return self.named(token)
        raise self.fail(token, "a number, a name, a function, '-', not or '('")

    def negated(self, operand: tuple[Expression, int], at: int) -> tuple[Expression, int]:
        if isinstance(operand[0], Constant) and operand[0].kind == "number":
            return Constant(-operand[0].value), at
        return self.node("neg", [operand], at)

    def named(self, token: Token) -> tuple[Expression, int]:
        if self.token.kind == "(":
            name = token.text.lower()
            if name not in FUNCTIONS:
                raise _error(
                    self.text, token.start, *unknown_name(token.text, FUNCTIONS, "function")
                )
            return self.node(name, self.arguments(), token.start)
        if token.kind == "if":
            raise self.fail(self.token, "'(', as in if(condition, a, b)")
        if token.text not in self.names:
            raise _error(self.text, token.start, *unknown_name(token.text, self.names))
        return Name(token.text), token.start

    def arguments(self) -> list[tuple[Expression, int]]:
        self.at += 1
        found = [self.expression(_CONDITIONAL)]
        while self.token.kind == ",":
            self.at += 1
            found.append(self.expression(_CONDITIONAL))
        self.take(")", "',' or ')'")
        return found


def check_names(names: Collection[str]) -> None:
    """Raises FormulaError for names that a formula could not write, or that are given twice."""
    for name in names:
        if not re.fullmatch(r"[^\W\d]\w*", name) or name.lower() in _WORDS:
            raise FormulaError(
                f"{name!r} cannot stand in a formula; expected letters, digits and _, "
                f"not starting with a digit, and none of {', '.join(sorted(_WORDS))}"
            )
    if len(set(names)) < len(names):
        raise FormulaError(f"names are given twice: {', '.join(sorted(names))}")


def parse_formula(text: str, names: Collection[str]) -> Expression:
    """The checked tree of a formula over `names`.

    Raises:
      FormulaError: with the column, what was found there and what was expected; also for more than
        `MAX_DEPTH` levels.
    """
    return _Parser(text, names).parse()
