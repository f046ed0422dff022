"""Block bands of packed sequences: which (query block, key block) pairs can attend each other.

Sequences of at most `max_len` tokens are packed one after the other, so a token attends only to
tokens less than `max_len` slots away. With the T slots cut into blocks, query block i needs the
key blocks i - reach … i (… i + reach where attention looks ahead). Going through these offsets one
by one keeps memory at T·block per step, linear in T, whatever `max_len` is.

Where sequences are short and most are nearly as long as `max_len`, a block for each sequence makes
fewer pairs: its queries need no other block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

UNROLL_LIMIT = 4
LONGEST_ROW = 256  # longer sequences are cut, so that scores stay linear in their length


class Rows(NamedTuple):
    """One block for each sequence, its tokens first.

    Attributes:
      slots: i32[num_blocks·block], the token slot of each place of a block, or T.
      places: i32[T], the place of each token slot, or num_blocks·block outside of all sequences.
    """

    slots: jax.Array
    places: jax.Array


class Band(NamedTuple):
    """How T token slots are cut: `num_blocks` blocks of `block` slots, offsets -ahead … reach."""

    block: int
    num_blocks: int
    reach: int
    ahead: int
    rows: Rows | None = None

    @property
    def pairs(self) -> int:
        """(query, key) pairs of slots that are scored."""
        return self.num_blocks * self.block**2 * (1 + self.reach + self.ahead)

    def split(self, x: jax.Array, fill: Any = 0) -> jax.Array:
        """[T, …] → [num_blocks, block, …], with `fill` where no token is."""
        if self.rows is None:
            padding = self.num_blocks * self.block - x.shape[0]
            x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        else:
            x = _take(x, self.rows.slots, self.rows.places, fill)
        return x.reshape(self.num_blocks, self.block, *x.shape[1:])

    def join(self, blocks: jax.Array, num_tokens: int) -> jax.Array:
        """[num_blocks, block, …] → [T, …], the other way."""
        x = blocks.reshape(self.num_blocks * self.block, *blocks.shape[2:])
        if self.rows is None:
            return x[:num_tokens]
        return _take(x, self.rows.places, self.rows.slots, 0)

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


def make_band(
    seq_offsets: jax.Array, num_tokens: int, max_len: int, *, look_ahead: bool = False
) -> Band:
    """The cut with fewer pairs: into equal blocks, or a block for each sequence."""
    band = equal_blocks(num_tokens, max_len, look_ahead=look_ahead)
    pairs_of_rows = (seq_offsets.shape[0] - 1) * max_len**2
    if max_len <= LONGEST_ROW and 0 < pairs_of_rows < band.pairs:
        return sequence_rows(seq_offsets, num_tokens, max_len)
    return band


def equal_blocks(num_tokens: int, max_len: int, *, look_ahead: bool = False) -> Band:
    """Blocks of 16 … 128 slots, near `max_len` / 2, wherever sequences begin."""
    block = 16
    while block < 128 and block * 2 <= max_len:
        block *= 2
    reach = -(-(max_len - 1) // block)
    return Band(block, -(-num_tokens // block), reach, reach if look_ahead else 0)


def sequence_rows(seq_offsets: jax.Array, num_tokens: int, max_len: int) -> Band:
    """A block of `max_len` places for each sequence."""
    num_sequences = seq_offsets.shape[0] - 1
    slots = seq_offsets[:-1, None] + jnp.arange(max_len, dtype=seq_offsets.dtype)
    slots = jnp.where(slots < seq_offsets[1:, None], slots, num_tokens).reshape(-1)
    segment, position = token_coordinates(seq_offsets, num_tokens)
    places = jnp.where(segment < num_sequences, segment * max_len + position, slots.size)
    return Band(max_len, num_sequences, 0, 0, Rows(slots, places))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take(x: jax.Array, index: jax.Array, back: jax.Array, fill: Any) -> jax.Array:
    """x[index], with `fill` for an index behind x; `back` is the index that undoes it.

    As every row is taken once at most, the gradient is a take too, and not a scatter.
    """
    return x.at[index].get(mode="fill", fill_value=fill)


def _take_forward(x, index, back, fill):
    return _take(x, index, back, fill), back


def _take_backward(fill, back, dout):
    return dout.at[back].get(mode="fill", fill_value=0), None, None


_take.defvjp(_take_forward, _take_backward)


def to_blocks(band: Band, x: jax.Array) -> jax.Array:
    """[T, H, D] → [num_blocks, H, block, D]: heads before tokens, as matmuls want them."""
    return band.split(x).swapaxes(1, 2)


def from_blocks(band: Band, blocks: jax.Array, num_tokens: int) -> jax.Array:
    """[num_blocks, H, block, D] → [T, H, D]."""
    return band.join(blocks.swapaxes(1, 2), num_tokens)


def token_coordinates(seq_offsets: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Each slot's sequence number (B behind the last sequence) and its place in that sequence."""
    slots = jnp.arange(num_tokens, dtype=jnp.int32)
    segment = jnp.searchsorted(seq_offsets[1:], slots, side="right").astype(jnp.int32)
    return segment, slots - seq_offsets[segment]
