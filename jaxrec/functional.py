"""NNX modules used functionally: parameters apart from structure, and the (init, apply) pair.

    rebuild, params = split_params(model)
    loss = lambda params: f(rebuild(params).encode(batch))
    grads = jax.jit(jax.grad(loss))(params)

Hot loops split once, outside `jax.jit`, and rebuild inside it, where that costs nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.typing import PyTree


class Variables(NamedTuple):
    """All arrays of a module: what is trained, and the rest (such as an index)."""

    params: PyTree
    rest: PyTree


def split_params[M: nnx.Module](model: M) -> tuple[Callable[[PyTree], M], PyTree]:
    """(rebuild, params): `rebuild(params)` is a module like `model` that holds `params`.

    The parameters are those of the model, not copies. What is no `nnx.Param` is kept as it is
    now inside `rebuild`, unless what it is given holds that too.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def rebuild(params: PyTree) -> M:
        return nnx.merge(graphdef, nnx.merge_state(rest, params))

    return rebuild, params


def with_params[M: nnx.Module](model: M, params: PyTree) -> M:
    """A module like `model` that holds `params`; neither shares Variables with the other."""
    rebuild, _ = split_params(nnx.clone(model))
    return rebuild(jax.tree.map(lambda leaf: leaf, params))


def copy_params(model: nnx.Module) -> PyTree:
    """The model's parameters in arrays of their own, so that they may be donated."""
    return jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))


def init_apply(
    make: Callable[[nnx.Rngs], nnx.Module],
) -> tuple[Callable[[jax.Array], Variables], Callable[..., Any]]:
    """The pair (init, apply) of a module, pure and ready for `jax.jit`, `vmap` and `grad`.

        init, apply = init_apply(lambda rngs: SASRec(config, rngs=rngs))
        variables = init(jax.random.key(0))
        hidden = apply(variables, batch, method="encode")

    Args:
      make: builds the module from random streams.

    Returns:
      init(key) → `Variables`; apply(variables, *args, method="__call__", **kwargs) → what the
      method returns. `apply` leaves the variables as they were.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: jax.Array) -> Variables:
        return Variables(*nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)[1:])

    def apply(variables: Variables, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        module = nnx.merge(graphdef, *variables)
        return getattr(module, method)(*args, **kwargs)

    return init, apply


def leaf_names(tree: PyTree) -> list[str]:
    """Dotted name of every leaf, in the order of `jax.tree.leaves`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return [name.removesuffix(".value") for name in names]
