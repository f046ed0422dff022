import functools
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import Parts, tiny_model, tiny_split

from jaxrec.data import UniformSampler
from jaxrec.ops.losses import full_softmax_loss, gbce_loss, sampled_softmax_loss
from jaxrec.train import (
    LossConfig,
    OptimizerConfig,
    Progress,
    TrainConfig,
    init_state,
    make_optimizer,
    make_schedule,
    train,
)
from jaxrec.train.objective import draw_negatives, target_loss
from jaxrec.train.step import first_nonfinite, make_step, parameter_names


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(first, second):
    for a, b in zip(leaves(first), leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["full", "sampled", "gbce"])
def test_one_batch_is_learned(name):
    loss = LossConfig(name=name, num_negatives=20, per_target=name == "gbce")
    parts = Parts(optimizer=OptimizerConfig(learning_rate=0.03), loss=loss)
    state, batch = parts.state, next(parts.batches)
    losses = []
    for _ in range(60):
        state, metrics = parts.step(state, batch)
        losses.append(float(metrics.loss))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert int(state.step) == 60


def test_metrics_count_what_is_real():
    parts = Parts()
    batch = next(parts.batches)
    _, metrics = parts.step(parts.state, batch)
    assert int(metrics.num_tokens) == (batch.item_ids != 0).sum()
    assert int(metrics.num_targets) == (batch.target_ids != 0).sum()
    assert int(metrics.nonfinite) == -1
    assert float(metrics.learning_rate) == 0.0  # the first step of the warm-up


def test_same_seed_same_steps_other_seed_others():
    def two_steps(seed):
        parts = Parts()
        state = init_state(parts.model, parts.optimizer, seed=seed, ema_decay=0.9)
        batch = next(parts.batches)
        for _ in range(3):  # the first has a learning rate of 0
            state, _ = parts.step(state, batch)
        return state

    first = two_steps(0)
    assert_same(first, two_steps(0))
    assert not np.array_equal(leaves(first.params)[0], leaves(two_steps(1).params)[0])


def test_state_is_donated_and_the_model_stays_usable():
    parts = Parts()
    batch = next(parts.batches)
    before = leaves(parts.model.table[...])
    parts.step(parts.state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(parts.state.params))
    assert_same(before, parts.model.table[...])


def test_average_follows_the_formula():
    decay, parts = 0.5, Parts(optimizer=OptimizerConfig(learning_rate=0.01), ema_decay=0.5)
    state, batch = parts.state, next(parts.batches)
    expected = leaves(state.ema_params)
    for number in range(15):
        state, _ = parts.step(state, batch)
        warm = min(decay, (1 + number) / (10 + number))
        expected = [
            warm * old + (1 - warm) * new
            for old, new in zip(expected, leaves(state.params), strict=True)
        ]
    for average, wanted in zip(leaves(state.eval_params), expected, strict=True):
        np.testing.assert_allclose(average, wanted, rtol=1e-5, atol=1e-7)
    assert not np.allclose(leaves(state.eval_params)[0], leaves(state.params)[0])


def test_without_average_the_weights_are_evaluated():
    parts = Parts(ema_decay=None)
    state, _ = parts.step(parts.state, next(parts.batches))
    assert state.ema_params is None
    assert state.eval_params is state.params


def poisoned(parts, name):
    """The state with one NaN in a parameter that only that parameter's gradient can see."""
    names = parameter_names(parts.state.params)
    flat, tree = jax.tree.flatten(parts.state.params)
    number = names.index(name)
    flat[number] = flat[number].at[0, 0].set(jnp.nan)
    return parts.state._replace(params=jax.tree.unflatten(tree, flat)), number


@pytest.mark.parametrize("name", ["kernel", "table"])
def test_nonfinite_step_is_named_and_not_applied(name):
    parts = Parts()
    state, number = poisoned(parts, name)
    before = jax.device_get(state)
    state, metrics = parts.step(state, next(parts.batches))
    assert 0 <= int(metrics.nonfinite) <= number
    assert int(state.step) == 1
    assert_same(before._replace(step=None), state._replace(step=None))


def test_first_nonfinite_finds_gradients_values_and_loss():
    good, bad, loss = jnp.ones(2), jnp.array([1, jnp.inf]), jnp.zeros(())
    assert int(first_nonfinite(loss, [good, good], [good, good])) == -1
    assert int(first_nonfinite(loss, [good, bad], [good, good])) == 1
    assert int(first_nonfinite(loss, [good, good], [bad, good])) == 0
    assert int(first_nonfinite(loss + jnp.nan, [good, good], [good, good])) == 2


def test_update_that_would_overflow_is_not_applied():
    parts = Parts()
    tx = optax.scale(-3e38)
    state = init_state(parts.model, tx, seed=0)
    step = make_step(parts.model, tx, loss=LossConfig(), schedule=lambda _: 1.0)
    batch = next(parts.batches)
    state, metrics = step(state, batch)
    for _ in range(40):  # finite gradients; the weights grow until the next update overflows
        state, metrics = step(state, batch)
    assert all(np.isfinite(leaf).all() for leaf in leaves(state.params))
    assert int(metrics.nonfinite) >= 0


SAMPLER = UniformSampler.create(10)


def test_popular_negatives_train_as_well():
    model, split = tiny_model(), tiny_split()
    config = TrainConfig(
        token_budget=64,
        max_sequences=16,
        num_epochs=1,
        loss=LossConfig("sampled", num_negatives=8, negatives="popularity"),
    )
    with TemporaryDirectory() as folder:
        result = train(model, split, config=config, folder=folder, progress=Progress())
    assert result.stopped_because == "done"


def test_losses_are_those_of_their_names():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (5, 4)), jax.random.normal(keys[1], (11, 4))
    targets = jnp.array([3, 1, 10, 0, 7])

    @functools.partial(jax.jit, static_argnums=0)
    def found(config):
        negatives, _ = draw_negatives(config, keys[2], (SAMPLER, SAMPLER), len(targets))
        return target_loss(config, hidden, table, targets, negatives)

    full = found(LossConfig(temperature=2.0))
    expected = jax.jit(full_softmax_loss)(hidden / 2, table, targets)
    np.testing.assert_allclose(full, expected, rtol=1e-6)
    negatives = jax.random.randint(keys[2], (6,), 1, 11, jnp.int32)
    sampled = found(LossConfig("sampled", 6))
    expected = jax.jit(sampled_softmax_loss)(
        hidden, table, targets, negatives, log_q=jnp.asarray(SAMPLER.log_q)
    )
    np.testing.assert_allclose(sampled, expected, rtol=1e-6)
    each = jax.random.randint(keys[2], (5, 6), 1, 11, jnp.int32)
    config = LossConfig("gbce", 6, per_target=True)
    expected = jax.jit(functools.partial(gbce_loss, calibration=0.75))(hidden, table, targets, each)
    np.testing.assert_allclose(found(config), expected, rtol=1e-6)


def test_bf16_compute_keeps_f32_master_weights():
    parts, model = Parts(), tiny_model(compute_dtype="bfloat16")
    config = OptimizerConfig(learning_rate=0.01)
    tx = make_optimizer(config)
    state = init_state(model, tx, seed=0, ema_decay=0.9)
    step = make_step(model, tx, loss=LossConfig(), schedule=make_schedule(config), ema_decay=0.9)
    batch = next(parts.batches)
    assert model.encode(batch).dtype == jnp.bfloat16
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    floats = [x for x in leaves((state.params, state.opt_state, state.ema_params)) if x.ndim]
    assert {leaf.dtype for leaf in floats} == {np.dtype("float32")}
    assert losses[-1] < 0.8 * losses[0]
    table = leaves(state.params)[parameter_names(state.params).index("table")]
    assert not np.array_equal(table, table.astype(jnp.bfloat16).astype(np.float32))


def test_state_of_another_average_is_an_error():
    parts = Parts(ema_decay=0.9)
    state = init_state(parts.model, parts.optimizer, seed=0, ema_decay=None)
    with pytest.raises(ValueError, match="different ema_decay"):
        parts.step(state, next(parts.batches))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossConfig(temperature=0.0), "temperature is 0"),
        (lambda: LossConfig(num_negatives=0), "num_negatives is 0"),
        (lambda: LossConfig(calibration=1.5), "calibration is 1.5"),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate is 0"),
        (lambda: OptimizerConfig(decay_steps=0), "decay_steps is 0"),
        (lambda: OptimizerConfig(clip_norm=-1.0), "clip_norm is -1"),
        (lambda: OptimizerConfig(b2=1.0), "b2 is 1"),
        (lambda: Parts(ema_decay=1.0), "ema_decay is 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def rates(schedule, *steps):
    return [float(jnp.asarray(schedule(step))) for step in steps]


def test_schedules_at_their_corners():
    constant = make_schedule(OptimizerConfig(learning_rate=0.5))
    assert rates(constant, 0, 1000) == [0.5, 0.5]
    warm = make_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=10))
    assert rates(warm, 0, 5, 10, 99) == [0, 0.25, 0.5, 0.5]
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=10, decay_steps=20, final_fraction=0.2)
    cosine = make_schedule(config)
    np.testing.assert_allclose(rates(cosine, 0, 10, 20, 30, 99), [0, 0.5, 0.3, 0.1, 0.1])


def test_clipping_and_weight_decay_are_applied():
    params, grads = {"w": jnp.full(4, 2.0)}, {"w": jnp.full(4, 100.0)}
    clipped: Any = make_optimizer(OptimizerConfig(learning_rate=1.0, clip_norm=1.0, b1=0.0, b2=0.0))
    plain: Any = make_optimizer(
        OptimizerConfig(learning_rate=1.0, clip_norm=None, weight_decay=0.25)
    )
    state = clipped.init(params)
    _, state = clipped.update(grads, state, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    np.testing.assert_allclose(moments[0], np.full(4, 0.5), rtol=1e-6)  # norm 200 → 1
    updates, _ = plain.update(grads, plain.init(params), params)
    np.testing.assert_allclose(leaves(updates)[0], np.full(4, -(1 + 0.25 * 2.0)), rtol=1e-5)
