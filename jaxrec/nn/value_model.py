"""Value models: one number an item from task scores and item features, by a checked formula."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32

from jaxrec.nn.formula import (
    Apply,
    Constant,
    Expression,
    FormulaError,
    Name,
    check_names,
    from_json,
    names_in,
    parse_formula,
    to_json,
)

LARGEST = 3.4e38
"""Every result is held between ±LARGEST, so nothing overflows and inf - inf cannot arise."""
LOG_FLOOR = 1e-30
"""log(x) is the logarithm of max(x, LOG_FLOOR): -69.08 for 0 and below."""
_EXP_LIMIT = float(np.log(LARGEST))


class Part(NamedTuple):
    """A part of a formula and its value for one item."""

    text: str
    value: float | bool


class ValueModel(nnx.Module):
    """Merges task scores and item features into the one score that items are ranked by.

        model = ValueModel("0.7 * click + 0.3 * like if age < 30 else click",
                           tasks=("click", "like"), features=("age",))
        model({"click": f32[M, K0], "like": f32[M, K0], "age": f32[M, K0]}) -> f32[M, K0]

    The language is that of `jaxrec.nn.formula`. Everything is computed in f32, and is defined for
    all finite inputs, so that none gives NaN or infinity:

    - x / 0 = 0; log(x) = log(max(x, 1e-30)); sqrt(x < 0) = 0;
    - x ** y is 1 for y = 0, 0 where x = 0 and y < 0, or where x < 0 and y is no whole number;
    - results are held between ±3.4e38; clip(x, low, high) is high where low > high.

    Infinite inputs count as ±3.4e38; NaN stays NaN. Gradients are those of the formulas where
    these are smooth, and 0 where a rule above sets in. A feature of whole numbers is exact up to
    2^24. The formula is structure, not weights: compiled with the call, at no cost of its own.

    Attributes:
      tasks: names of the task scores, in the order of an over-arch's last axis.
      features: names of the item features, row-aligned columns of the index.
      tree: the checked expression.

    Args:
      formula: text, or its JSON form.

    Raises:
      FormulaError: with the place that is wrong and what was expected there; also for names that
        cannot stand in a formula, and for a formula that is a condition.
    """

    def __init__(
        self,
        formula: str | int | float | Mapping[str, Any],
        *,
        tasks: Sequence[str],
        features: Sequence[str] = (),
    ):
        self.tasks, self.features = tuple(tasks), tuple(features)
        names = (*self.tasks, *self.features)
        check_names(names)
        is_text = isinstance(formula, str)
        tree = parse_formula(formula, names) if is_text else from_json(formula, names)
        if tree.kind != "number":
            raise FormulaError(f"{tree} is a condition; expected a number, as in if({tree}, 1, 0)")
        self.tree: Expression = tree

    @property
    def formula(self) -> str:
        """The formula as text, in one normal form."""
        return str(self.tree)

    def __call__(
        self,
        values: Mapping[str, Array],
        *,
        valid: Bool[Array, "*shape"] | None = None,
    ) -> Float32[Array, "*shape"]:
        """The value of every item.

        Args:
          values: an array for each name that the formula reads, of shapes that broadcast; others
            are passed over.
          valid: False gives -inf, whatever the inputs.

        Raises:
          ValueError: an array is missing.
        """
        out = self._evaluate(values, lambda node, value: None)
        if valid is None:
            return out
        return jnp.where(valid, out, -jnp.inf)

    def of_scores(
        self,
        scores: Float32[Array, "M K0 T"],
        features: Mapping[str, Array] | None = None,
        *,
        valid: Bool[Array, "M K0"] | None = None,
    ) -> Float32[Array, "M K0"]:
        """The value of an over-arch's candidates: `tasks` names the last axis of its scores.

        Raises:
          ValueError: another number of tasks, or a feature that is missing.
        """
        if scores.shape[-1] != len(self.tasks):
            raise ValueError(
                f"there are scores of {scores.shape[-1]} tasks; the value model names "
                f"{len(self.tasks)}: {', '.join(self.tasks)}"
            )
        by_task = {task: scores[..., i] for i, task in enumerate(self.tasks)}
        return self({**(features or {}), **by_task}, valid=valid)

    def explain(self, values: Mapping[str, float | int | bool | Array]) -> tuple[Part, ...]:
        """Every sub-expression with its value for one item, parts before the whole. Host only.

        Args:
          values: a number for each name that the formula reads.
        """
        parts: dict[str, Part] = {}

        def note(node: Expression, value: jax.Array) -> None:
            if not isinstance(node, Constant):
                text = str(node)
                parts.setdefault(text, Part(text, value.item()))

        whole = self._evaluate({name: jnp.asarray(value) for name, value in values.items()}, note)
        return tuple(parts.values()) or (Part(self.formula, whole.item()),)

    def to_json(self) -> dict[str, Any]:
        """Formula and names in JSON types; `from_json` makes the same model of it."""
        return {
            "formula": to_json(self.tree),
            "tasks": list(self.tasks),
            "features": list(self.features),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ValueModel":
        """The model of `to_json`; its formula may also be text.

        Raises:
          FormulaError: as from the class, with the path to the part that is wrong.
        """
        missing = {"formula", "tasks"} - set(data)
        if missing:
            raise FormulaError(f"a value model in JSON needs {' and '.join(sorted(missing))}")
        return cls(data["formula"], tasks=data["tasks"], features=data.get("features", ()))

    def _evaluate(
        self, values: Mapping[str, Array], note: Callable[[Expression, jax.Array], None]
    ) -> jax.Array:
        missing = sorted(names_in(self.tree) - set(values))
        if missing:
            raise ValueError(
                f"the formula {self.formula!r} reads {', '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not among the values given: "
                f"{', '.join(sorted(values)) or 'none'}"
            )

        def value_of(node: Expression) -> jax.Array:
            if isinstance(node, Constant):
                is_bool = isinstance(node.value, bool)
                return jnp.asarray(node.value, jnp.bool_ if is_bool else jnp.float32)
            if isinstance(node, Name):
                value = _saturated(jnp.asarray(values[node.name]).astype(jnp.float32))
            else:
                value = _apply(node, [value_of(arg) for arg in node.args])
            note(node, value)
            return value

        return value_of(self.tree)


def _apply(node: Apply, args: list[jax.Array]) -> jax.Array:
    if node.op == "**" and isinstance(node.args[1], Constant):
        exponent = node.args[1].value
        if exponent == int(exponent) and 0 < exponent <= 16:
            return _saturated(jax.lax.integer_pow(args[0], int(exponent)))
    value = _OPERATIONS[node.op](*args)
    return _saturated(value) if value.dtype == jnp.float32 else value


def _saturated(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -LARGEST, LARGEST)


def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    # Both branches are computed, and differentiated: neither may divide by zero.
    zero = y == 0
    return jnp.where(zero, 0, x / jnp.where(zero, 1, y))


def _sqrt(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _exp(x: jax.Array) -> jax.Array:
    return jnp.exp(jnp.minimum(x, _EXP_LIMIT))


def _power(x: jax.Array, y: jax.Array) -> jax.Array:
    size = jnp.where(x == 0, 1, jnp.abs(x))
    magnitude = _exp(y * jnp.log(size))
    odd = jnp.abs(jnp.remainder(y, 2)) == 1
    negative = jnp.where(odd, -magnitude, jnp.where(y == jnp.floor(y), magnitude, 0))
    of_zero = jnp.where(y == 0, 1.0, 0.0)
    return jnp.where(x == 0, of_zero, jnp.where(x > 0, magnitude, negative))


def _pairwise(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def fold(first: jax.Array, *rest: jax.Array) -> jax.Array:
        for value in rest:
            first = function(first, value)
        return first

    return fold


_OPERATIONS: dict[str, Callable[..., jax.Array]] = {
    "or": jnp.logical_or,
    "and": jnp.logical_and,
    "not": jnp.logical_not,
    "<": jnp.less,
    "<=": jnp.less_equal,
    ">": jnp.greater,
    ">=": jnp.greater_equal,
    "==": jnp.equal,
    "!=": jnp.not_equal,
    "+": jnp.add,
    "-": jnp.subtract,
    "*": jnp.multiply,
    "/": _divide,
    "**": _power,
    "neg": jnp.negative,
    "min": _pairwise(jnp.minimum),
    "max": _pairwise(jnp.maximum),
    "clip": lambda x, low, high: jnp.minimum(jnp.maximum(x, low), high),
    "abs": jnp.abs,
    "exp": _exp,
    "log": lambda x: jnp.log(jnp.maximum(x, LOG_FLOOR)),
    "sqrt": _sqrt,
    "sigmoid": jax.nn.sigmoid,
    "if": jnp.where,
}
