"""Sums by key against float64, their gradients, and the bits' independence of other keys."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.ops.row_runs import find_runs, sum_bags, sum_runs, take_rows

NUM, LIMIT = 70, 12


@jax.jit
def sums(keys, values):
    runs = find_runs(keys, LIMIT)
    return sum_runs(values, runs, runs.firsts), runs.distinct(fill=-1), runs.num_runs


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, LIMIT + 2), min_size=NUM, max_size=NUM))
def test_sums_of_each_key(keys):
    keys = np.array(keys, np.int32)
    values = np.random.default_rng(0).standard_normal((NUM, 3)).astype(np.float32)
    found, distinct, num_runs = sums(keys, values)
    wanted = np.unique(keys[keys < LIMIT])
    assert int(num_runs) == len(wanted)
    np.testing.assert_array_equal(distinct[: len(wanted)], wanted)
    assert (np.asarray(distinct[len(wanted) :]) == -1).all()
    exact = [values[keys == key].astype(np.float64).sum(0) for key in wanted]
    np.testing.assert_allclose(found[: len(wanted)], np.reshape(exact, (-1, 3)), atol=1e-5)
    assert not np.asarray(found[len(wanted) :]).any()


def test_a_sum_has_the_same_bits_whatever_the_other_keys_are():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((NUM, 3)).astype(np.float32)
    keys = rng.integers(1, LIMIT, NUM).astype(np.int32)
    keys[[3, 10, 11, 40]] = 0
    others = np.where(keys == 0, 0, LIMIT).astype(np.int32)
    np.testing.assert_array_equal(sums(keys, values)[0][0], sums(others, values)[0][0])


def test_rows_are_taken_and_their_gradient_is_a_sum():
    keys = jnp.array([4, 2, 4, LIMIT, 2, 4])
    runs = find_runs(keys, LIMIT)
    slots = jnp.array([1, 0, 1, 2, 0, 1])  # 2: none
    starts = jnp.array([0, 2])
    rows = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    weights = jnp.arange(12.0).reshape(6, 2)

    def total(rows):
        return (take_rows(rows, slots, runs, starts) * weights).sum()

    np.testing.assert_array_equal(jax.jit(take_rows)(rows, slots, runs, starts)[3], 0)
    grad = jax.jit(jax.grad(total))(rows)
    np.testing.assert_allclose(
        grad, [weights[1] + weights[4], weights[0] + weights[2] + weights[5]]
    )


@pytest.mark.parametrize("offsets", [[0, 0, 3, 3, 5], [0, 8, 8, 8, 8], [0, 0, 0, 0, 0]])
def test_bags(offsets):
    spans, offsets = list(pairwise(offsets)), jnp.array(offsets)
    values = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    wanted = np.stack([values[a:b].sum(0) for a, b in spans])
    np.testing.assert_allclose(jax.jit(sum_bags)(values, offsets), wanted, atol=1e-6)
    weights = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    grad = jax.jit(jax.grad(lambda v: (sum_bags(v, offsets) * weights).sum()))(values)
    by_hand = np.zeros((8, 2))
    for bag, (a, b) in enumerate(spans):
        by_hand[a:b] = weights[bag]
    np.testing.assert_array_equal(grad, by_hand)
