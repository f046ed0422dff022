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

    def split(self, x: jax.Array) -> jax.Array:
        """[T, …] → [num_blocks, block, …], with zeros behind T."""
        padding = self.num_blocks * self.block - x.shape[0]
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(self.num_blocks, self.block, *x.shape[1:])

    def keys(self, x: jax.Array, fill: Any = 0) -> jax.Array:
        """[T, …] → blocks with `reach` blocks of `fill` before them and `ahead` behind."""
        padding = [(self.reach, self.ahead)] + [(0, 0)] * x.ndim
        return jnp.pad(self.split(x), padding, constant_values=fill)

    def at_offset(self, keys: jax.Array, offset: jax.Array | int) -> jax.Array:
        """The key block that lies `offset` blocks before each query block."""
        return lax.dynamic_slice_in_dim(keys, self.reach - offset, self.num_blocks, axis=0)

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


def token_coordinates(seq_offsets: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Each slot's sequence number (B behind the last sequence) and its place in that sequence."""
    slots = jnp.arange(num_tokens, dtype=jnp.int32)
    segment = jnp.searchsorted(seq_offsets[1:], slots, side="right").astype(jnp.int32)
    return segment, slots - seq_offsets[segment]
