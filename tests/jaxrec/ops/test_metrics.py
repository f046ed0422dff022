"""Ranks and metrics against a naive loop over candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.ops.metrics import ranking_metrics, target_ranks

B, V, D, L = 5, 23, 4, 6
ranks_of = jax.jit(target_ranks, static_argnames="item_chunk")


def naive_ranks(hidden, table, targets, history):
    ranks = []
    for b, target in enumerate(targets):
        scores = hidden[b].astype(np.float64) @ table.T.astype(np.float64)
        left_out = {0, target, *([] if history is None else history[b])}
        ahead = [v for v in range(len(table)) if v not in left_out and scores[v] >= scores[target]]
        ranks.append(len(ahead))
    return ranks


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([1, 7, 23, 16384]), st.booleans())
def test_ranks_equal_the_naive_loop(seed, item_chunk, with_history):
    rng = np.random.default_rng(seed)
    # Few small integers: scores are exact and many tie.
    hidden = rng.integers(-2, 3, (B, D)).astype(np.float32)
    table = rng.integers(-2, 3, (V, D)).astype(np.float32)
    targets = rng.integers(1, V, B).astype(np.int32)
    history = rng.integers(0, V, (B, L)).astype(np.int32)
    history[0, 2], history[1] = targets[0], 0  # a target of its own history; no history
    history = history if with_history else None
    actual = ranks_of(
        *map(jnp.asarray, (hidden, table, targets)),
        None if history is None else jnp.asarray(history),
        item_chunk=item_chunk,
    )
    np.testing.assert_array_equal(actual, naive_ranks(hidden, table, targets, history))


def test_a_constant_scorer_earns_nothing():
    """Equal rows tie although a matmul need not give them the same last bit."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)
    table = jnp.tile(jnp.asarray(rng.normal(size=(1, 64)), jnp.float32), (1001, 1))
    ranks = ranks_of(hidden, table, jnp.arange(1, 33))
    np.testing.assert_array_equal(ranks, 999)


def test_not_a_number_earns_nothing():
    hidden, table = jnp.full((2, D), jnp.nan), jnp.ones((V, D))
    np.testing.assert_array_equal(ranks_of(hidden, table, jnp.asarray([1, 2])), V - 2)


def test_bf16_scores_are_summed_in_f32():
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(B, 64)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(200, 64)), jnp.bfloat16)
    targets = rng.integers(1, 200, B).astype(np.int32)
    expected = naive_ranks(np.asarray(hidden), np.asarray(table), targets, None)
    np.testing.assert_array_equal(ranks_of(hidden, table, jnp.asarray(targets)), expected)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_metrics_equal_the_naive_loop(ranks):
    metrics = ranking_metrics(np.array(ranks), cutoffs=(1, 10))
    for k in (1, 10):
        assert metrics[f"hr@{k}"] == pytest.approx(np.mean([rank < k for rank in ranks]))
        gains = [1 / np.log2(rank + 2) if rank < k else 0 for rank in ranks]
        assert metrics[f"ndcg@{k}"] == pytest.approx(np.mean(gains))
    assert metrics["mrr"] == pytest.approx(np.mean([1 / (rank + 1) for rank in ranks]))
    assert set(metrics) == {"hr@1", "hr@10", "ndcg@1", "ndcg@10", "mrr"}


def test_errors():
    with pytest.raises(ValueError, match="evaluation set is empty"):
        ranking_metrics(np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="item_chunk"):
        target_ranks(jnp.ones((1, D)), jnp.ones((V, D)), jnp.asarray([1]), item_chunk=0)
