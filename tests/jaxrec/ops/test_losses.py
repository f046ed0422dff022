"""Losses and their gradients against float64 formulas over the whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrec.ops import losses as module
from jaxrec.ops.losses import (
    full_softmax_loss,
    gathered_scores,
    gbce_loss,
    sampled_softmax_loss,
)

M, V, D = 21, 30, 8


def case(seed=0, *, rows=M, dtype=jnp.float32, padded=(3, 20), magnitude=1.0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(magnitude * rng.normal(size=(rows, D)), dtype)
    table = jnp.asarray(rng.normal(size=(V, D)), dtype)
    target_ids = rng.integers(1, V, rows).astype(np.int32)
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


TILED = 90  # tiles of all 21 rows and 4 items, the last of which begins among the one before


@pytest.mark.parametrize(
    ("rows", "max_logits"),
    [
        (M, 1),  # one logit at a time
        (M, 5),  # rows and items that the tiles do not divide
        (M, TILED),
        (M, 1 << 22),  # all items at a time, and all rows
        (150, 64 * V),  # and 64 of the rows
    ],
)
def test_full_softmax_and_gradients(rows, max_logits):
    hidden, table, ids = case(rows=rows)
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


@pytest.mark.parametrize("max_logits", [TILED, 1 << 22])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_full_softmax_of_bf16(max_logits, dtype):
    hidden, table, ids = case(2, dtype=jnp.bfloat16)
    table = table.astype(dtype)  # as large as an optimizer wants it; products are in bf16
    loss, grads = jax.value_and_grad(
        lambda h, e: full_softmax_loss(h, e, ids, max_logits), argnums=(0, 1)
    )(hidden, table)
    expected, *dense = dense_full(hidden, table, ids)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for grad, true, like in zip(grads, dense, (hidden, table), strict=True):
        assert grad.dtype == like.dtype
        error = np.abs(np.asarray(grad).astype(np.float64) - true)
        assert error.max() <= 0.02 * np.abs(true).max()


def test_ten_million_items_need_no_more_memory_than_a_tile():
    sizes = ((1024, 64), (10_000_001, 64))
    hidden, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sizes)
    ids = jax.ShapeDtypeStruct((1024,), jnp.int32)
    gradient = jax.jit(jax.value_and_grad(full_softmax_loss, argnums=(0, 1)))
    analysis = gradient.lower(hidden, table, ids).compile().memory_analysis()
    assert analysis is not None
    assert analysis.output_size_in_bytes >= 4 * table.size  # the gradient itself
    assert analysis.temp_size_in_bytes < 2 * 4 * (1 << 22)  # logits would be 41 GB


@pytest.mark.parametrize("magnitude", [1e3, 1e6])
@pytest.mark.parametrize("max_logits", [TILED, 1 << 22])
def test_large_logits_are_stable(magnitude, max_logits):
    hidden, table, ids = case(3, magnitude=magnitude)
    loss, grads = jax.value_and_grad(
        lambda h, e: full_softmax_loss(h, e, ids, max_logits), argnums=(0, 1)
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
        for max_logits in (TILED, None):
            loss, grad = jax.value_and_grad(
                lambda e, n=max_logits: full_softmax_loss(hidden, e, ids, n)
            )(loud)
            np.testing.assert_allclose(loss, dense_full(hidden, loud, ids)[0], rtol=1e-5)
            assert not np.asarray(grad[0]).any()


NEGATIVES = jnp.asarray(np.random.default_rng(5).integers(1, V, (M, 6)), jnp.int32)
LOSSES = {
    "full": lambda h, e, ids: full_softmax_loss(h, e, ids, 64 * V),
    "full_tiled": lambda h, e, ids: full_softmax_loss(h, e, ids, TILED),
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


def test_scores_of_gathered_rows_in_chunks(monkeypatch):
    """Of five rows each, and their gradients, as of all at once."""
    hidden, table, _ = case(13)

    def run():
        out, pull = jax.vjp(lambda h, e: gathered_scores(h, e, NEGATIVES), hidden, table)
        return out, *pull(out)

    whole = run()
    monkeypatch.setattr(module, "MAX_GATHERED", 5 * 6 * D)
    h, e = wide(hidden, table)
    scores = np.einsum("md,msd->ms", h, e[NEGATIVES])
    dtable = np.zeros_like(e)
    np.add.at(dtable, np.asarray(NEGATIVES), scores[:, :, None] * h[:, None])
    expected = scores, np.einsum("ms,msd->md", scores, e[NEGATIVES]), dtable
    for found in (whole, run()):
        for actual, true in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual, true, rtol=1e-5, atol=1e-4)


def test_rows_of_many_negatives_are_not_held_at_once():
    shapes = ((4096, 64), (100_000, 64))
    hidden, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    ids, negatives = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4096,), (4096, 256)))
    gradient = jax.jit(jax.grad(sampled_softmax_loss, argnums=(0, 1)))
    analysis = gradient.lower(hidden, table, ids, negatives).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 160 << 20  # the rows alone would be 256 MiB


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
