"""From candidates to results: scores of an over-arch, values of a formula, the best k.

M users, T tasks, K0 candidates of a user. A model may have `heads` (`jaxrec.nn.TaskHeads`: several
queries a user) and an `overarch` (`jaxrec.nn.OverArch`); both are optional and found by name.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxrec.nn import ValueModel, overarch_of
from jaxrec.ops.overarch import dot_scores

COMPONENT = "overarch."
"""Prefix of the columns that hold an over-arch's item components."""

type _Array = jax.Array | np.ndarray


class Ranked(NamedTuple):
    """The best k candidates, best first: ids -1 and values -inf behind the last."""

    values: Float32[Array, "M k"]
    ids: Int32[Array, "M k"]


def heads_of(model: Any) -> Any | None:
    """The model's task heads, or None if it has none."""
    return getattr(model, "heads", None)


def tasks_of(model: Any) -> tuple[str, ...]:
    """Names of the tasks that the model makes queries for."""
    heads = heads_of(model)
    return ("score",) if heads is None else heads.config.tasks


def component_columns(
    model: Any, item_embeddings: Float[_Array, "N D"], *, dtype: str = "float32"
) -> dict[str, Array]:
    """What the model's over-arch caches of each item, as columns of an index; {} without one.

    Needed wherever items enter an index: at the build, and for every upsert.

    Args:
      item_embeddings: of the items, without a row for padding.
      dtype: of the floating columns; bfloat16 halves them.
    """
    if overarch_of(model) is None:
        return {}
    return _component_columns(*nnx.split(model), item_embeddings, dtype)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _component_columns(structure, state, item_embeddings, dtype: str):
    # An over-arch may have something of its own for each item: for it, row 0 is padding.
    table = jnp.pad(item_embeddings, ((1, 0), (0, 0)))
    overarch: Any = overarch_of(nnx.merge(structure, state))
    components = _named(overarch.item_components(table))
    floating = {n: jnp.issubdtype(x.dtype, jnp.floating) for n, x in components.items()}
    return {
        COMPONENT + n: x[1:].astype(dtype if floating[n] else x.dtype)
        for n, x in components.items()
    }


def components_from(model: Any, columns: Mapping[str, Array]) -> Any:
    """The over-arch's components from gathered columns; the other way about of the above."""
    overarch = overarch_of(model)
    assert overarch is not None
    like = jax.eval_shape(lambda: overarch.item_components(model.item_embeddings()))
    leaves = [columns[COMPONENT + name].astype(shape.dtype) for name, shape in _named(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def task_scores(
    model: Any,
    queries: Float[Array, "M T D"],
    columns: Mapping[str, Array],
    vectors: Float[Array, "M K0 D"] | None,
    valid: Bool[Array, "M K0"],
) -> Float32[Array, "M K0 T"]:
    """Every task's score of every candidate: by the over-arch, or else inner products."""
    overarch = overarch_of(model)
    if overarch is not None:
        return overarch(queries, components_from(model, columns), valid)
    assert vectors is not None
    scores = jax.vmap(dot_scores, in_axes=(1, None), out_axes=-1)(queries, vectors)
    return jnp.where(valid[..., None], scores, -jnp.inf)


def rank(
    scores: Float32[Array, "M K0 T"],
    ids: Int32[Array, "M K0"],
    valid: Bool[Array, "M K0"],
    columns: Mapping[str, Array],
    value_model: ValueModel | None,
    k: int,
) -> Ranked:
    """The k candidates of the largest value; without a value model, of the only task's score."""
    if value_model is None:
        values = jnp.where(valid, scores[..., 0], -jnp.inf)
    else:
        features = {name: columns[name] for name in value_model.features}
        values = value_model.of_scores(scores, features, valid=valid)
    # NaN would stand first: a candidate without a value is no result.
    values = jnp.where(jnp.isnan(values), -jnp.inf, values)
    values, places = jax.lax.top_k(values, k)
    found = jnp.take_along_axis(ids, places, axis=1)
    return Ranked(values, jnp.where(values > -jnp.inf, found, -1))


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted paths."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
