"""Work lists of the IVF kernel: the tiles of each slot, and the slots of each program."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from pallas_kernels.ivf.config import IvfKernelConfig


class Slots(NamedTuple):
    """What each of a query's S slots scans: the first `counts` of its tiles."""

    tiles: Int32[Array, "Q S T"]
    counts: Int32[Array, "Q S"]
    in_order: bool
    """The tiles of a slot follow each other."""


def strided_slots(starts, sizes, num_slots: int, slot_tiles: int) -> Slots:
    """Each query's lists of `sizes` tiles from `starts` on, dealt out to its slots in turn.

    Rows of a list lie together and so do the best of a query; dealing spreads them over all lanes.
    """
    ends = jnp.cumsum(sizes, axis=1)
    count = num_slots * slot_tiles
    position = jnp.arange(count, dtype=jnp.int32)
    first = jnp.take_along_axis(starts - (ends - sizes), _first_after(ends, count), axis=1)
    used = position < ends[:, -1:]
    tiles, used = (
        x.reshape(-1, slot_tiles, num_slots).swapaxes(1, 2)
        for x in (jnp.where(used, first + position, 0), used)
    )
    return Slots(tiles, jnp.sum(used, axis=2, dtype=jnp.int32), in_order=False)


def list_slots(starts, sizes, num_slots: int, slot_tiles: int) -> Slots:
    """Each query's lists cut in slots: queries that probe a list have slots with the same tiles."""
    pieces = (sizes + slot_tiles - 1) // slot_tiles
    ends = jnp.cumsum(pieces, axis=1)
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    which = _first_after(ends, num_slots)

    def own(of_list):
        return jnp.take_along_axis(of_list, which, axis=1)

    done = (slot - own(ends - pieces)) * slot_tiles
    counts = jnp.where(slot < ends[:, -1:], jnp.minimum(own(sizes) - done, slot_tiles), 0)
    step = jnp.arange(slot_tiles, dtype=jnp.int32)
    tiles = (own(starts) + done)[..., None] + step
    return Slots(jnp.where(step < counts[..., None], tiles, 0), counts, in_order=True)


def _first_after(ends: Int32[Array, "Q P"], count: int) -> Int32[Array, "Q {count}"]:
    """In each row of rising `ends` the first beyond position 0, 1, … count - 1, or the last."""
    if ends.shape[1] == 1:
        return jnp.zeros((len(ends), count), jnp.int32)
    each = jnp.arange(len(ends), dtype=jnp.int32)[:, None]
    ending = jnp.zeros((len(ends), count), jnp.int32).at[each, ends].add(1, mode="drop")
    return jnp.minimum(jnp.cumsum(ending, axis=1), ends.shape[1] - 1)


def programs(
    slots: Slots, num_programs: int, config: IvfKernelConfig
) -> Int32[Array, "{num_programs} N"]:
    """Slots [W, N] of each program, -1 for none; those of the same first tile share, if wanted."""
    counts, block = slots.counts.reshape(-1), config.block_queries
    slot = jnp.arange(counts.size, dtype=jnp.int32)
    if not config.share:
        own = jnp.where(counts > 0, slot, -1)[:, None]
        return jnp.pad(own, ((0, 0), (0, block - 1)), constant_values=-1)
    nowhere = jnp.int32(2**31 - 1)
    first = jnp.where(counts > 0, slots.tiles[:, :, 0].reshape(-1), nowhere)
    first, order = lax.sort((first, slot), num_keys=1)
    is_new = jnp.concatenate([jnp.ones(1, bool), first[1:] != first[:-1]])
    rank = slot - lax.cummax(jnp.where(is_new, slot, 0))
    opens = (first != nowhere) & (rank % block == 0)
    program = jnp.where(first != nowhere, jnp.cumsum(opens, dtype=jnp.int32) - 1, num_programs)
    nobody = jnp.full((num_programs, block), -1, jnp.int32)
    return nobody.at[program, rank % block].set(order, mode="drop")
