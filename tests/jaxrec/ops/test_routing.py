"""Routing picks the best experts, weighs them as asked, and the losses pull towards balance."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.ops import routing as ops

LOGITS = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)


route = jax.jit(
    ops.route, static_argnames=("slots", "scoring", "normalise", "groups", "top_groups")
)


@jax.jit
def figures(routing):
    """(balancing loss, squared variation, statistics) of a routing."""
    squared = ops.cv_squared(ops.importance(routing))
    return ops.load_balancing_loss(routing), squared, ops.router_stats(routing)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", ["all", "selected"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_gates_are_those_of_the_best_experts(scoring, normalise, slots):
    found = route(jnp.asarray(LOGITS), slots=slots, scoring=scoring, normalise=normalise)
    order = np.argsort(-LOGITS, axis=1)[:, :slots]
    np.testing.assert_array_equal(found.expert_ids, order)
    scores = softmax(LOGITS) if scoring == "softmax" else 1 / (1 + np.exp(-LOGITS))
    gates = np.take_along_axis(scores, order, axis=1)
    gates = gates / gates.sum(1, keepdims=True) if normalise == "selected" else gates
    np.testing.assert_allclose(found.gates, gates, rtol=1e-5)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)


def test_softmax_of_the_selected_is_the_renormalised_softmax():
    found = route(jnp.asarray(LOGITS), slots=2)
    best = -np.sort(-LOGITS, axis=1)[:, :2]
    np.testing.assert_allclose(found.gates, softmax(best), rtol=1e-5)


def test_bias_moves_the_choice_but_not_the_gates():
    bias = np.zeros(8, np.float32)
    bias[5] = 10
    found = route(jnp.asarray(LOGITS), slots=1, normalise="all", bias=jnp.asarray(bias))
    assert (np.asarray(found.expert_ids) == 5).all()
    np.testing.assert_allclose(found.gates[:, 0], softmax(LOGITS)[:, 5], rtol=1e-5)


def test_only_the_best_groups_are_used():
    scores = np.zeros((1, 16), np.float32)
    scores[0, [13, 14, 5, 6]] = [0.9, 0.6, 0.8, 0.7]
    scores[0, 0] = 0.85  # alone in its group: two good experts outweigh it
    found = route(jnp.asarray(scores), slots=4, scoring="sigmoid", groups=4, top_groups=2)
    np.testing.assert_array_equal(found.expert_ids[0], [13, 5, 6, 14])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_goes_nowhere_and_counts_nowhere(dtype):
    valid = np.arange(40) % 3 > 0
    logits = jnp.asarray(LOGITS, dtype)
    padded = route(logits, slots=2, valid=jnp.asarray(valid))
    alone = route(logits[valid], slots=2)
    assert (np.asarray(padded.expert_ids)[~valid] == -1).all()
    assert not np.asarray(padded.gates)[~valid].any()
    (*losses, mine), (*wanted, theirs) = figures(padded), figures(alone)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    z_loss = jax.jit(ops.router_z_loss)
    z = z_loss(logits, jnp.asarray(valid))
    assert float(z) == pytest.approx(float(z_loss(logits[valid])), rel=1e-5)
    np.testing.assert_array_equal(mine.load, theirs.load)
    assert float(mine.entropy) == pytest.approx(float(theirs.entropy), rel=1e-5)


def test_balanced_routing_costs_one_and_collapse_costs_as_many_as_experts():
    even = jnp.asarray(np.eye(8, dtype=np.float32)[np.arange(64) % 8] * 50)
    assert float(figures(route(even, slots=1))[0]) == pytest.approx(1)
    one = jnp.asarray(np.tile(np.eye(8, dtype=np.float32)[3] * 50, (64, 1)))
    balance, squared, stats = figures(route(one, slots=1))
    assert float(balance) == pytest.approx(8)
    assert float(squared) == pytest.approx(7)
    assert int(stats.dead_experts) == 7
    assert float(stats.max_over_mean) == pytest.approx(8)
    assert float(stats.entropy) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        ops.load_balancing_loss,
        lambda r: ops.cv_squared(ops.importance(r)),
        lambda r: ops.sequence_balancing_loss(r, jnp.arange(256) // 64, 4),
    ],
)
def test_descending_a_loss_balances_the_experts(loss):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((256, 16)), jnp.float32)
    skew = jnp.asarray(rng.standard_normal((16, 8)) / 4, jnp.float32).at[0, 0].add(3)
    x = x.at[:, 0].set(1.0)

    @jax.jit
    def descend(w):
        return w - 0.5 * jax.grad(lambda w: loss(ops.route(x @ w, slots=2)))(w)

    def spread(w):
        return float(figures(route(x @ w, slots=2))[2].max_over_mean)

    w = skew
    for _ in range(100):
        w = descend(w)
    assert spread(w) < 0.75 * spread(skew)


def test_loss_of_sequences_is_the_mean_of_their_own_losses():
    segments = np.repeat([0, 1, 3, 4], [10, 25, 3, 2])  # sequence 2 is empty, 4 is padding
    routing = route(jnp.asarray(LOGITS), slots=2, valid=jnp.asarray(segments < 4))
    own = [float(figures(route(jnp.asarray(LOGITS[segments == s]), slots=2))[0]) for s in (0, 1, 3)]
    together = jax.jit(ops.sequence_balancing_loss, static_argnums=2)(
        routing, jnp.asarray(segments), 4
    )
    assert float(together) == pytest.approx(np.mean(own), rel=1e-5)


def test_bias_moves_against_the_load():
    moved = ops.updated_bias(jnp.zeros(4), jnp.array([5, 4, 3, 4]), rate=0.01)
    np.testing.assert_allclose(moved, [-0.01, 0, 0.01, 0], atol=1e-9)


within_capacity = jax.jit(ops.within_capacity, static_argnames=("num_experts", "capacity"))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 12))
def test_capacity_keeps_the_first_of_each_expert(seed, capacity):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((20, 4)), axis=1)[:, :2].astype(np.int32)
    ids[rng.random(20) < 0.2] = -1
    gates = rng.random((20, 2)).astype(np.float32)
    kept, weights, dropped = within_capacity(ids, gates, num_experts=4, capacity=capacity)
    used, wanted = np.zeros(4, int), ids.copy()
    for slot in range(2):
        for token in range(20):
            expert = ids[token, slot]
            if expert >= 0:
                used[expert] += 1
                if used[expert] > capacity:
                    wanted[token, slot] = -1
    np.testing.assert_array_equal(kept, wanted)
    np.testing.assert_array_equal(weights, np.where(wanted >= 0, gates, 0))
    assert int(dropped) == ((ids >= 0) & (wanted < 0)).sum()


def test_noise_is_scaled_by_what_is_learned():
    quiet = ops.noisy(jnp.zeros((4000, 2)), jnp.full((4000, 2), -20.0), jax.random.key(0))
    assert float(jnp.abs(quiet).max()) < 1e-6
    loud = ops.noisy(jnp.zeros((4000, 2)), jnp.full((4000, 2), 3.0), jax.random.key(0))
    assert float(loud.std()) == pytest.approx(np.log1p(np.exp(3)), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 9}, "slots is 9; expected 1 to 8"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": 5, "groups": 4, "top_groups": 2}, "slots is 5; expected 1 to 4"),
        ({"slots": 1, "groups": 3}, "8 experts in 3 groups"),
        ({"slots": 1, "scoring": "tanh"}, "scoring is 'tanh'"),
    ],
)
def test_choices_that_cannot_be(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        route(jnp.asarray(LOGITS), **options)
