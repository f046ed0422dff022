"""What depends on what in a traced program: a graph of its primitive operations."""

from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import Literal


@dataclass(eq=False)
class Node:
    """One operation; `inner` are the operations inside a loop or branch, which count as it."""

    equation: Any
    sources: set["Node"] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.equation.primitive.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.equation.invars[0].aval.shape

    @property
    def dtype(self) -> Any:
        return self.equation.invars[0].aval.dtype


def dataflow(closed: Any) -> list[Node]:
    """The operations of a closed jaxpr, calls inlined, in an order of execution."""
    nodes: list[Node] = []
    jaxpr = closed.jaxpr
    _walk(jaxpr, [None] * len(jaxpr.invars), nodes)
    return nodes


def _walk(jaxpr: Any, inputs: list[Node | None], nodes: list[Node]) -> list[Node | None]:
    made: dict[Any, Node | None] = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(variable: Any) -> Node | None:
        return None if isinstance(variable, Literal) else made.get(variable)

    for equation in jaxpr.eqns:
        given = [of(variable) for variable in equation.invars]
        inner = _called(equation)
        if inner is not None:
            outs = _walk(inner, given, nodes)
        else:
            node = Node(equation, {source for source in given if source is not None})
            nodes.append(node)
            outs = [node] * len(equation.outvars)
        made.update(zip(equation.outvars, outs, strict=True))
    return [of(variable) for variable in jaxpr.outvars]


def _called(equation: Any) -> Any:
    """The jaxpr of a call that is made once and as it stands."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        if inner is not None and equation.primitive.name not in ("while", "scan", "cond"):
            inner = getattr(inner, "jaxpr", inner)
            if len(inner.invars) == len(equation.invars):
                return inner
    return None


def ancestors(node: Node) -> set[Node]:
    """All that must have run before."""
    found: set[Node] = set()
    open_ = [node]
    while open_:
        for source in open_.pop().sources - found:
            found.add(source)
            open_.append(source)
    return found
