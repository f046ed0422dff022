"""Block bands of packed sequences: which (query block, key block) pairs can attend each other.

Sequences of at most `max_len` tokens are packed one after the other, so a token attends only to
tokens less than `max_len` slots away. With the T slots cut into blocks, query block i needs the
key blocks i - reach … i (… i + reach where attention looks ahead). Going through these offsets one
by one keeps memory at T·block per step, linear in T, whatever `max_len` is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

UNROLL_LIMIT = 4


class Band(NamedTuple):
    """How T token slots are cut: `num_blocks` blocks of `block` slots, offsets -ahead … reach."""

    block: int
    num_blocks: int
    reach: int
    ahead: int

    def split(self, x: jax.Array, fill: Any = 0) -> jax.Array:
        """[T, …] → [num_blocks, block, …], with `fill` behind T."""
        padding = self.num_blocks * self.block - x.shape[0]
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(self.num_blocks, self.block, *x.shape[1:])

    def surround(self, blocks: jax.Array, fill: Any = 0) -> jax.Array:
        """Key blocks with `reach` blocks of `fill` before them and `ahead` behind."""
        padding = [(self.reach, self.ahead)] + [(0, 0)] * (blocks.ndim - 1)
        return jnp.pad(blocks, padding, constant_values=fill)

    def inner(self, keys: jax.Array) -> jax.Array:
        """Takes off what `surround` added."""
        return keys[self.reach : self.reach + self.num_blocks]

    def at_offset(self, keys: jax.Array, offset: jax.Array | int) -> jax.Array:
        """The key block that lies `offset` blocks before each query block."""
        return lax.dynamic_slice_in_dim(keys, self.reach - offset, self.num_blocks, axis=0)

    def add_at_offset(self, keys: jax.Array, offset: jax.Array | int, x: jax.Array) -> jax.Array:
        """Adds to the key blocks what `at_offset` would read."""
        total = self.at_offset(keys, offset) + x
        return lax.dynamic_update_slice_in_dim(keys, total, self.reach - offset, axis=0)

    def accumulate(self, step: Callable[[Any, Any], Any], init: Any) -> Any:
        """Folds `step(carry, offset)` over all offsets; long bands are recomputed in backward."""
        offsets = range(-self.ahead, self.reach + 1)
        if len(offsets) <= UNROLL_LIMIT:
            carry = init
            for offset in offsets:
                carry = step(carry, offset)
            return carry
        body = jax.checkpoint(lambda carry, offset: (step(carry, offset), None))
        return lax.scan(body, init, jnp.arange(-self.ahead, self.reach + 1))[0]


def make_band(num_tokens: int, max_len: int, *, look_ahead: bool = False) -> Band:
    """Chooses a block near `max_len` / 2, between 16 and 128 slots."""
    block = 16
    while block < 128 and block * 2 <= max_len:
        block *= 2
    reach = -(-(max_len - 1) // block)
    return Band(block, -(-num_tokens // block), reach, reach if look_ahead else 0)


def to_blocks(band: Band, x: jax.Array) -> jax.Array:
    """[T, H, D] → [num_blocks, H, block, D]: heads before tokens, as matmuls want them."""
    return band.split(x).swapaxes(1, 2)


def from_blocks(blocks: jax.Array, num_tokens: int) -> jax.Array:
    """[num_blocks, H, block, D] → [T, H, D]."""
    num_blocks, heads, block, width = blocks.shape
    return blocks.swapaxes(1, 2).reshape(num_blocks * block, heads, width)[:num_tokens]


def token_coordinates(seq_offsets: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Each slot's sequence number (B behind the last sequence) and its place in that sequence."""
    slots = jnp.arange(num_tokens, dtype=jnp.int32)
    segment = jnp.searchsorted(seq_offsets[1:], slots, side="right").astype(jnp.int32)
    return segment, slots - seq_offsets[segment]
