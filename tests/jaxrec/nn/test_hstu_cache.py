"""Serving with a cache gives what the whole history gives."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import EXPERTS, FEW, HALVES, build, pack, tolerance

from jaxrec.ops.jagged import to_padded

NAMES = ("hstu-time7-absoluteTrue", "hstu-time0-absoluteFalse", "hstu-experts")
CONFIGS = {name: (FEW | EXPERTS)[name] for name in NAMES}
CONFIGS["bf16"] = HALVES["hstu-time7-absoluteTrue-bf16"]
SEQUENCES = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [11], [2, 7, 1, 8, 2, 8])


def split(sequences, times, begins, ends, width):
    """Tokens begin … end of each sequence, right-aligned in rows of `width`."""
    items, seconds = (np.zeros((len(sequences), width), np.int32) for _ in range(2))
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if end > begin:
            items[row, begin - end :] = sequences[row][begin:end]
            seconds[row, begin - end :] = times[row][begin:end]
    return items, seconds


def compiled(model):
    """(encode, extend) of a model."""
    graphdef, state = nnx.split(model)
    merged: Any = lambda: nnx.merge(graphdef, state)  # noqa: E731
    return (
        jax.jit(lambda batch: merged().encode(batch)),
        jax.jit(lambda cache, *new: merged().extend(cache, *new)),
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_history_in_parts_equals_the_whole(config):
    model: Any = build(config)
    encode, extend = compiled(model)
    batch = pack(SEQUENCES, num_tokens=32, num_sequences=3)
    offsets = np.asarray(batch.seq_offsets)
    times = [batch.timestamps[a:b] for a, b in itertools.pairwise(offsets)]
    want = to_padded(encode(batch).astype(jnp.float32), offsets, 16)
    cache, begins = model.empty_cache(3), np.zeros(3, int)
    # First calls of different lengths for each user, none for one; then one token at a time.
    for ends, width in (([5, 1, 0], 8), ([6, 1, 4], 8), ([7, 1, 5], 1), ([12, 1, 6], 8)):
        new = split(SEQUENCES, times, begins, ends, width)
        hidden, cache = extend(cache, *new)
        np.testing.assert_array_equal(cache.lengths, ends)
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            got = np.asarray(hidden, np.float32)[row, width - (end - begin) :]
            np.testing.assert_allclose(got, want[row, begin:end], atol=tolerance(config))
        begins = np.asarray(ends)


def test_too_long_and_misplaced_sequences_are_nan_from_then_on():
    model: Any = build(replace(CONFIGS["hstu-time0-absoluteFalse"], max_len=4))
    items = jnp.asarray([[1, 2, 3], [1, 0, 2], [0, 0, 3]])
    _, extend = compiled(model)
    hidden, cache = extend(model.empty_cache(3), items)
    np.testing.assert_array_equal(np.isnan(hidden).any((1, 2)), [False, True, False])
    hidden, cache = extend(cache, jnp.asarray([[0, 1, 2], [0, 0, 1], [0, 1, 2]]))
    np.testing.assert_array_equal(np.isnan(hidden).any((1, 2)), [True, True, False])
    np.testing.assert_array_equal(cache.lengths, [5, 5, 3])


def test_a_time_bias_needs_timestamps():
    model: Any = build(CONFIGS["hstu-time7-absoluteTrue"])
    with pytest.raises(ValueError, match="give the new tokens' timestamps"):
        model.extend(model.empty_cache(1), jnp.asarray([[1]]))
