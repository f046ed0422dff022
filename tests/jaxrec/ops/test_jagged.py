"""Jagged operations against loops over the sequences."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.ops import jagged

NUM_TOKENS, NUM_SEQUENCES = 24, 4
LENGTHS = st.lists(st.integers(0, 6), min_size=NUM_SEQUENCES, max_size=NUM_SEQUENCES)

segment_ids = jax.jit(jagged.segment_ids, static_argnums=1)
positions = jax.jit(jagged.positions, static_argnums=1)
positions_from_end = jax.jit(jagged.positions_from_end, static_argnums=1)
valid_tokens = jax.jit(jagged.valid_tokens, static_argnums=1)
to_padded = jax.jit(jagged.to_padded, static_argnums=2)


def offsets_of(lengths):
    return np.cumsum([0, *lengths]).astype(np.int32)


@settings(deadline=None)
@given(LENGTHS)
def test_token_coordinates(lengths):
    offsets = offsets_of(lengths)
    spare = NUM_TOKENS - sum(lengths)
    expected_segments = [b for b, n in enumerate(lengths) for _ in range(n)]
    expected_segments += [NUM_SEQUENCES] * spare
    starts = [i for n in [*lengths, spare] for i in range(n)]
    ends = [n - 1 - i for n in [*lengths, spare] for i in range(n)]
    np.testing.assert_array_equal(segment_ids(offsets, NUM_TOKENS), expected_segments)
    np.testing.assert_array_equal(positions(offsets, NUM_TOKENS), starts)
    np.testing.assert_array_equal(positions_from_end(offsets, NUM_TOKENS), ends)
    np.testing.assert_array_equal(
        valid_tokens(offsets, NUM_TOKENS), np.arange(NUM_TOKENS) < sum(lengths)
    )


@settings(deadline=None)
@given(LENGTHS, st.sampled_from([1, 4, 9]))
def test_to_padded(lengths, max_len):
    offsets = offsets_of(lengths)
    values = np.arange(1, NUM_TOKENS * 2 + 1, dtype=np.float32).reshape(NUM_TOKENS, 2)
    padded = np.zeros((NUM_SEQUENCES, max_len, 2), np.float32)
    for b, length in enumerate(lengths):
        kept = min(length, max_len)
        padded[b, :kept] = values[offsets[b] : offsets[b] + kept]
    np.testing.assert_array_equal(to_padded(jnp.asarray(values), offsets, max_len), padded)


def test_a_batch_is_a_tree_of_its_arrays():
    batch = jagged.JaggedBatch(*(np.arange(n, dtype=np.int32) for n in (5, 3, 2, 2, 5)))
    doubled = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(batch)
    assert isinstance(doubled, jagged.JaggedBatch)
    np.testing.assert_array_equal(doubled.item_ids, 2 * batch.item_ids)
