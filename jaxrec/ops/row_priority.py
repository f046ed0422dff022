"""Which rows of two successive batches collide, found by their owners; inside `shard_map`.

A row that both batches name is *late*: the second batch may read it only after the first batch's
update, and that update may not wait. All other rows of the second batch may be read before (early),
and all other gradients of the first applied afterwards (deferred). A row is late for all devices
that ask for it, or for none, so its gradients are still added up together.

Letters: S devices, C places a box, L late places a box, R rows of an owner.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Int32

from jaxrec.ops.row_exchange import Axis, exchange


class LateMarks(NamedTuple):
    """Which places of the boxes of two batches are late, at the owner and at those who ask."""

    owner_first: Bool[Array, "S C"]
    owner_second: Bool[Array, "S C"]
    asker_first: Bool[Array, "S C"]
    asker_second: Bool[Array, "S C"]


def mark_late(
    first: Int[Array, "S C"], second: Int[Array, "S C"], *, num_own: int, axis: Axis
) -> LateMarks:
    """Compares what this owner is asked for in two batches, and tells those who ask.

    Args:
      first, second: own rows by box place, R for none.
      num_own: R.

    Cost: two bitmaps of R bytes, and one all-to-all of S · C bytes.
    """
    in_first, in_second = _bitmap(first, num_own), _bitmap(second, num_own)
    owner_first = in_second.at[first].get(mode="fill", fill_value=False)
    owner_second = in_first.at[second].get(mode="fill", fill_value=False)
    both = owner_first.astype(jnp.uint8) + 2 * owner_second.astype(jnp.uint8)
    told = exchange(both, axis)
    return LateMarks(owner_first, owner_second, told % 2 == 1, told >= 2)


def _bitmap(rows: Array, num_own: int) -> Bool[Array, "R"]:
    return jnp.zeros(num_own, bool).at[rows.reshape(-1)].set(True, mode="drop")


def late_places(late: Bool[Array, "S C"], capacity: int) -> Int32[Array, "S L"]:
    """Each box's late places in their order, C behind the last; the same on both sides."""
    size = late.shape[1]

    def of_box(marks: Array) -> Array:
        return jnp.nonzero(marks, size=capacity, fill_value=size)[0]

    return jax.vmap(of_box)(late).astype(jnp.int32)


def flat_places(places: Int[Array, "S L"], size: int) -> Int32[Array, "Q"]:
    """Places of all boxes counted together, S · C for none; size is C."""
    boxes = jnp.arange(places.shape[0], dtype=jnp.int32)[:, None]
    flat = jnp.where(places < size, boxes * size + places, places.shape[0] * size)
    return flat.reshape(-1)


def late_needed(late: Bool[Array, "S C"], axis: Axis) -> Int32[Array, ""]:
    """Late places of the fullest box of all devices."""
    return lax.pmax(late.sum(axis=1, dtype=jnp.int32).max(), axis)
