"""Collectives in two halves: started here, waited for there; what stands between may run meanwhile.

    under_way = all_to_all_start(rows, "data", split_axis=0, concat_axis=0)
    hidden = forward(params, batch)
    received = under_way.done()

inside of `jax.shard_map`. JAX has them, not yet as a public interface; where an installed version
has not, the plain collective runs at the start and `done` only hands its result out: the same
values, and whether it runs beside something else is the compiler's choice alone. So it is on a CPU,
too. They have no gradient; train through them in a `jax.custom_vjp` of your own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax._src.lax import parallel as _parallel
from jaxtyping import Array, Shaped


class UnderWay(NamedTuple):
    """A collective that was started.

    Attributes:
      pending: JAX's future of the result, or the result itself.
    """

    pending: Any

    def done(self) -> Shaped[Array, "..."]:
        """The result; once."""
        return self.pending.done() if hasattr(self.pending, "done") else self.pending


def _start(plain: Callable[..., Any], *args: Any, **options: Any) -> UnderWay:
    halved = getattr(_parallel, f"{plain.__name__}_start", plain)
    return UnderWay(halved(*args, **options))


def all_to_all_start(
    x: Shaped[Array, "..."],
    axis_name: str,
    *,
    split_axis: int,
    concat_axis: int,
    tiled: bool = True,
) -> UnderWay:
    """Starts `jax.lax.all_to_all`."""
    return _start(jax.lax.all_to_all, x, axis_name, split_axis, concat_axis, tiled=tiled)


def all_gather_start(
    x: Shaped[Array, "..."], axis_name: str, *, axis: int = 0, tiled: bool = True
) -> UnderWay:
    """Starts `jax.lax.all_gather`."""
    return _start(jax.lax.all_gather, x, axis_name, axis=axis, tiled=tiled)


def psum_start(x: Shaped[Array, "..."], axis_name: str) -> UnderWay:
    """Starts `jax.lax.psum`."""
    return _start(jax.lax.psum, x, axis_name)


def psum_scatter_start(
    x: Shaped[Array, "..."], axis_name: str, *, scatter_dimension: int = 0, tiled: bool = True
) -> UnderWay:
    """Starts `jax.lax.psum_scatter`."""
    options = {"scatter_dimension": scatter_dimension, "tiled": tiled}
    return _start(jax.lax.psum_scatter, x, axis_name, **options)


def ppermute_start(
    x: Shaped[Array, "..."], axis_name: str, *, perm: list[tuple[int, int]]
) -> UnderWay:
    """Starts `jax.lax.ppermute`."""
    return _start(jax.lax.ppermute, x, axis_name, perm)
