"""Losses and their gradients against float64 formulas over the whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrec.ops.losses import full_softmax_loss, gbce_loss, sampled_softmax_loss

M, V, D = 21, 30, 8


def case(seed=0, *, dtype=jnp.float32, padded=(3, 20), magnitude=1.0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(magnitude * rng.normal(size=(M, D)), dtype)
    table = jnp.asarray(rng.normal(size=(V, D)), dtype)
    target_ids = rng.integers(1, V, M).astype(np.int32)
    target_ids[list(padded)] = 0
    return hidden, table, jnp.asarray(target_ids)


def wide(*arrays):
    return [np.asarray(x).astype(np.float64) for x in arrays]


def dense_full(hidden, table, target_ids):
    """The full softmax and both gradients in float64."""
    hidden, table = wide(hidden, table)
    ids = np.asarray(target_ids)
    logits = hidden @ table[1:].T
    peak = logits.max(1, keepdims=True)
    exps = np.exp(logits - peak)
    losses = np.log(exps.sum(1)) + peak[:, 0] - (hidden * table[ids]).sum(1)
    weight = (ids != 0) / max((ids != 0).sum(), 1)
    dlogits = np.zeros((len(ids), len(table)))
    dlogits[:, 1:] = exps / exps.sum(1, keepdims=True)
    dlogits[np.arange(len(ids)), ids] -= 1
    dlogits *= weight[:, None]
    return (losses * weight).sum(), dlogits @ table, dlogits.T @ hidden


@pytest.mark.parametrize("max_logits", [1, V, 4 * V + 3, 7 * V, M * V, 1 << 22])
def test_full_softmax_and_gradients(max_logits):
    hidden, table, ids = case()
    loss, grads = jax.value_and_grad(
        lambda h, e: jnp.multiply(3, full_softmax_loss(h, e, ids, max_logits)), argnums=(0, 1)
    )(hidden, table)
    expected, *dense = dense_full(hidden, table, ids)
    np.testing.assert_allclose(loss, 3 * expected, rtol=1e-6)
    np.testing.assert_allclose(
        full_softmax_loss(hidden, table, ids, max_logits), expected, rtol=1e-6
    )
    for grad, true in zip(grads, dense, strict=True):
        np.testing.assert_allclose(grad, 3 * true, atol=2e-6)


def test_full_softmax_of_bf16():
    hidden, table, ids = case(2, dtype=jnp.bfloat16)
    loss, grads = jax.value_and_grad(
        lambda h, e: full_softmax_loss(h, e, ids, 5 * V), argnums=(0, 1)
    )(hidden, table)
    expected, *dense = dense_full(hidden, table, ids)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for grad, true in zip(grads, dense, strict=True):
        assert grad.dtype == jnp.bfloat16
        error = np.abs(np.asarray(grad).astype(np.float64) - true)
        assert error.max() <= 0.02 * np.abs(true).max()


@pytest.mark.parametrize("magnitude", [1e3, 1e6])
def test_large_logits_are_stable(magnitude):
    hidden, table, ids = case(3, magnitude=magnitude)
    loss, grads = jax.value_and_grad(
        lambda h, e: full_softmax_loss(h, e, ids, 4 * V), argnums=(0, 1)
    )(hidden, table)
    expected, *dense = dense_full(hidden, table, ids)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for grad, true in zip(grads, dense, strict=True):
        np.testing.assert_allclose(grad, true, atol=2e-3 * np.abs(true).max())


def test_the_padding_row_never_counts():
    """Neither its own score nor the underflow of all others below it."""
    hidden, table, ids = case(4)
    hidden = hidden.at[:, 0].set(50.0)
    table = table.at[:, 0].set(-10.0)  # every item scores about -500 …
    for padding in (0.0, 100.0):  # … and padding 0 or 5000
        loud = table.at[0].set(0).at[0, 0].set(padding)
        loss, grad = jax.value_and_grad(lambda e: full_softmax_loss(hidden, e, ids))(loud)
        np.testing.assert_allclose(loss, dense_full(hidden, loud, ids)[0], rtol=1e-5)
        assert not np.asarray(grad[0]).any()


NEGATIVES = jnp.asarray(np.random.default_rng(5).integers(1, V, (M, 6)), jnp.int32)
LOSSES = {
    "full": lambda h, e, ids: full_softmax_loss(h, e, ids, 4 * V),
    "sampled": lambda h, e, ids: sampled_softmax_loss(h, e, ids, NEGATIVES),
    "sampled_shared": lambda h, e, ids: sampled_softmax_loss(h, e, ids, NEGATIVES[0]),
    "gbce": lambda h, e, ids: gbce_loss(h, e, ids, NEGATIVES),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_without_targets_the_loss_and_its_gradients_are_zero(loss):
    hidden, table, _ = case(6)
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden, table, jnp.zeros(M, jnp.int32))
    assert value == 0
    for grad in grads:
        assert not np.asarray(grad).any()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_padded_targets_change_nothing(loss):
    hidden, table, ids = case(7)
    changed = hidden.at[3].set(9.0).at[20].set(-4.0)
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden, table, ids)
    again, changed_grads = jax.value_and_grad(loss, argnums=(0, 1))(changed, table, ids)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    assert not np.asarray(grads[0][3]).any()
    assert not np.asarray(grads[0][20]).any()
    np.testing.assert_allclose(grads[1], changed_grads[1], atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_by_finite_differences(loss):
    hidden, table, ids = case(8)
    check_grads(
        jax.jit(lambda h, e: loss(h, e, ids)),
        (hidden, table),
        order=1,
        modes=["rev"],
        eps=1e-2,
        atol=5e-3,
        rtol=5e-3,
    )


def sampled_by_hand(hidden, table, ids, negatives, log_q=None):
    hidden, table = wide(hidden, table)
    losses = []
    for m, target in enumerate(np.asarray(ids)):
        if target == 0:
            continue
        row = np.asarray(negatives if negatives.ndim == 1 else negatives[m])
        total = np.exp(hidden[m] @ table[target])
        for item in row:
            if item not in (target, 0):
                count = 1 if log_q is None else len(row) * np.exp(float(log_q[item]))
                total += np.exp(hidden[m] @ table[item]) / count
        losses.append(np.log(total) - hidden[m] @ table[target])
    return np.mean(losses)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("with_log_q", [True, False])
def test_sampled_softmax_by_hand(shared, with_log_q):
    hidden, table, ids = case(9)
    negatives = NEGATIVES.at[0, 1].set(ids[0]).at[:, 4].set(0)
    negatives = negatives[0] if shared else negatives
    log_q = jnp.linspace(-4, -1, V) if with_log_q else None
    actual = sampled_softmax_loss(hidden, table, ids, negatives, log_q=log_q)
    expected = sampled_by_hand(hidden, table, ids, negatives, log_q)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_every_item_drawn_once_is_the_full_softmax():
    hidden, table, ids = case(10)
    everything = jnp.arange(1, V, dtype=jnp.int32)
    uniform = jnp.full(V, -np.log(V - 1), jnp.float32)
    full = jax.value_and_grad(full_softmax_loss, argnums=(0, 1))(hidden, table, ids)
    for log_q in (None, uniform):
        value, grads = jax.value_and_grad(
            lambda h, e, log_q=log_q: sampled_softmax_loss(h, e, ids, everything, log_q=log_q),
            argnums=(0, 1),
        )(hidden, table)
        np.testing.assert_allclose(value, full[0], rtol=1e-6)
        for grad, true in zip(grads, full[1], strict=True):
            np.testing.assert_allclose(grad, true, atol=1e-6)


def test_log_q_undoes_a_skewed_draw():
    """Items drawn exactly as often as their probability says give the full softmax."""
    hidden, table, ids = case(11)
    counts = np.random.default_rng(11).integers(1, 9, V)
    counts[0] = 0
    draws = jnp.asarray(np.repeat(np.arange(V), counts), jnp.int32)
    log_q = jnp.asarray(np.log(np.maximum(counts, 1) / counts.sum()), jnp.float32)
    full = jax.value_and_grad(full_softmax_loss, argnums=(0, 1))(hidden, table, ids)
    value, grads = jax.value_and_grad(
        lambda h, e: sampled_softmax_loss(h, e, ids, draws, log_q=log_q), argnums=(0, 1)
    )(hidden, table)
    np.testing.assert_allclose(value, full[0], rtol=1e-6)
    for grad, true in zip(grads, full[1], strict=True):
        np.testing.assert_allclose(grad, true, atol=1e-6)
    uncorrected = sampled_softmax_loss(hidden, table, ids, draws)
    assert abs(uncorrected - full[0]) > 0.1


@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("shared", [True, False])
def test_gbce_by_hand(calibration, shared):
    hidden, table, ids = case(12)
    negatives = NEGATIVES.at[0, 1].set(ids[0]).at[:, 4].set(0)
    negatives = negatives[0] if shared else negatives
    h, e = wide(hidden, table)
    alpha = 6 / (V - 2)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    losses = []
    for m, target in enumerate(np.asarray(ids)):
        if target == 0:
            continue
        row = np.asarray(negatives if shared else negatives[m])
        scores = np.array([h[m] @ e[item] for item in row if item not in (target, 0)])
        positive = 1 / (1 + np.exp(-h[m] @ e[target]))
        losses.append(-beta * np.log(positive) - np.log(1 / (1 + np.exp(scores))).sum())
    actual = gbce_loss(hidden, table, ids, negatives, calibration=calibration)
    np.testing.assert_allclose(actual, np.mean(losses), rtol=1e-5)


def test_errors():
    hidden, table, ids = case()
    for loss in (sampled_softmax_loss, gbce_loss):
        for shape in ((3, 6), (), (M, 2, 2)):
            with pytest.raises(ValueError, match=r"expected \[S\]"):
                loss(hidden, table, ids, jnp.ones(shape, jnp.int32))
    with pytest.raises(ValueError, match="between 0 and 1"):
        gbce_loss(hidden, table, ids, NEGATIVES, calibration=1.5)
    with pytest.raises(ValueError, match="one negative at least"):
        gbce_loss(hidden, table, ids, NEGATIVES[:, :0])
    with pytest.raises(ValueError, match="needs two items"):
        gbce_loss(hidden, table[:2], jnp.minimum(ids, 1), NEGATIVES * 0 + 1)
