"""Steps that train only the item rows they name, beside steps that train all of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_run import MAX_LEN, NUM_ITEMS, tiny_batches, tiny_model, tiny_split

from jaxrec.nn import HSTU, HSTUConfig, MixtureOfLogits, MixtureOfLogitsConfig, TwoStage
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.ops.row_optimizers import RowSGD
from jaxrec.train import (
    LossConfig,
    OptimizerConfig,
    OverArchLoss,
    Progress,
    RowWise,
    TrainConfig,
    init_state,
    make_optimizer,
    make_schedule,
    make_step,
    train,
)
from jaxrec.train.step import parameter_names

NUM_EXTRA = 30  # items that no batch holds
ITEMS = NUM_ITEMS + NUM_EXTRA
CONFIG = HSTUConfig(ITEMS, max_len=MAX_LEN, width=8, num_blocks=1, dropout=0.1)


def hstu():
    return HSTU(CONFIG, rngs=nnx.Rngs(0))


def with_attributes():
    config = HSTUConfig(
        ITEMS, max_len=MAX_LEN, width=8, num_blocks=1, num_attributes=5, attribute_slots=2
    )
    ids = np.random.default_rng(0).integers(0, 6, (ITEMS + 1, 2)).astype(np.int32)
    return HSTU(config, rngs=nnx.Rngs(0), attribute_ids=ids)


def two_stage():
    sizes = MixtureOfLogitsConfig(8, 2, 2, component_width=4, gate_hidden=4)
    return TwoStage(hstu(), MixtureOfLogits(sizes, rngs=nnx.Rngs(3)))


SAMPLED = LossConfig("sampled", num_negatives=12)
CASES = {
    "sampled": (hstu, SAMPLED),
    "gbce, per target": (hstu, LossConfig("gbce", num_negatives=3, per_target=True)),
    "attributes": (with_attributes, SAMPLED),
    "overarch": (two_stage, LossConfig("sampled", 6, overarch=OverArchLoss(num_negatives=5))),
}


def steps(model, optimizer, loss, count=3):
    state = init_state(model, optimizer, seed=0)
    step = make_step(model, optimizer, loss=loss, schedule=lambda _: 0.1)
    batches, metrics = tiny_batches(tiny_split()), None
    for _ in range(count):
        state, metrics = step(state, next(batches))
    return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize(("make", "loss"), CASES.values(), ids=CASES)
def test_plain_descent_is_that_of_all_rows(make, loss):
    """It leaves rows without a gradient alone, so that both ways must agree."""
    model = make()
    clip = optax.clip_by_global_norm(0.5)
    every = steps(model, optax.chain(clip, optax.sgd(0.1)), loss)
    named = steps(model, RowWise(RowSGD(0.1), optax.sgd(0.1), clip_norm=0.5), loss)
    assert every[1].grad_norm > 0.5, "clipping has something to do"
    for a, b in zip(every[1][:4], named[1][:4], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    names = parameter_names(every[0].params)
    leaves = map(jax.tree.leaves, (every[0].params, named[0].params))
    for name, a, b in zip(names, *leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("rows", ["adam", "adagrad"])
def test_rows_that_no_step_names_stay_to_the_bit(rows):
    config = OptimizerConfig(learning_rate=0.05, warmup_steps=1, rows=rows)
    model, optimizer = hstu(), make_optimizer(config)
    loss = LossConfig("sampled", num_negatives=2)
    before = np.asarray(model.items.table[...])
    step = make_step(model, optimizer, loss=loss, schedule=make_schedule(config))
    state, batch = init_state(model, optimizer, seed=0), next(tiny_batches(tiny_split()))
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    after = np.asarray(state.params["items"]["table"][...])
    named = np.union1d(batch.item_ids, batch.target_ids)
    changed = np.flatnonzero((before != after).any(1))
    assert set(named[named != 0]) <= set(changed)
    assert len(changed) <= len(named) + 12 * 2, "besides, negatives at most"
    assert losses[-1] < 0.8 * losses[1]
    moments = jax.tree.leaves(state.opt_state.moments)
    assert {len(moment) for moment in moments} == {ITEMS + 1}
    assert not any(np.asarray(moment)[0].any() for moment in moments[:2]), "padding"


def test_a_step_that_is_not_finite_changes_nothing():
    optimizer = make_optimizer(OptimizerConfig(rows="adam"))
    state = init_state(hstu(), optimizer, seed=0)
    table = state.params["items"]["table"]
    batch = next(tiny_batches(tiny_split()))
    item = int(batch.item_ids[0])
    table[...] = table[...].at[item, 0].set(jnp.nan)
    before = jax.device_get(state)
    step = make_step(hstu(), optimizer, loss=SAMPLED, schedule=lambda _: 0.1)
    state, metrics = step(state, batch)
    assert int(metrics.nonfinite) >= 0
    assert int(state.step) == 1
    pairs = map(jax.tree.leaves, (before._replace(step=0), state._replace(step=0)))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_array_equal(a, b)


def compiled_step(num_items, *, tokens=512):
    """The step of an HSTU with so many items, from shapes alone."""
    config = HSTUConfig(num_items, max_len=32, width=64, num_blocks=1)
    optimizer = make_optimizer(OptimizerConfig(rows="adam"))
    model = nnx.eval_shape(lambda: HSTU(config, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda: init_state(HSTU(config, rngs=nnx.Rngs(0)), optimizer, seed=0))
    loss = LossConfig("sampled", num_negatives=256)
    step = make_step(model, optimizer, loss=loss, schedule=lambda _: 0.1)
    slots = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    offsets = jax.ShapeDtypeStruct((65,), jnp.int32)
    batch = JaggedBatch(slots, offsets, slots, slots, slots)
    return step.lower(state, batch).compile()


def test_nothing_in_a_step_is_as_large_as_the_catalogue():
    compiled = compiled_step(4_000_000)
    small = compiled_step(40_000)
    analysis, reference = compiled.memory_analysis(), small.memory_analysis()
    assert analysis.temp_size_in_bytes < reference.temp_size_in_bytes + (1 << 20)
    assert analysis.alias_size_in_bytes >= 3 * 4 * 64 * 4_000_001, "table and moments in place"
    made = re.findall(r"= f32\[4000001,64\]\S* (\S+)\(", compiled.as_text())
    assert set(made) <= {"parameter", "scatter", "fusion", "get-tuple-element", "while", "call"}


@pytest.mark.parametrize(
    ("loss", "ema_decay", "message"),
    [(LossConfig("full"), None, "every item"), (SAMPLED, 0.9, "averages every row")],
)
def test_what_touches_every_row_is_refused(loss, ema_decay, message):
    optimizer = make_optimizer(OptimizerConfig(rows="adam"))
    with pytest.raises(ValueError, match=message):
        make_step(hstu(), optimizer, loss=loss, schedule=lambda _: 0.1, ema_decay=ema_decay)


def test_models_without_item_rows_are_refused():
    optimizer = make_optimizer(OptimizerConfig(rows="adam"))
    with pytest.raises(ValueError, match="0 tables of item rows"):
        init_state(tiny_model(), optimizer, seed=0)


def test_a_run_is_resumed_to_the_bit(tmp_path):
    def run(folder, epochs):
        config = TrainConfig(
            token_budget=64, max_sequences=16, num_epochs=epochs, loss=SAMPLED,
            optimizer=OptimizerConfig(rows="adagrad", learning_rate=0.05),
        )  # fmt: skip
        return train(hstu(), tiny_split(), config=config, folder=folder, progress=Progress())

    run(tmp_path / "twice", 1)
    twice, once = run(tmp_path / "twice", 2), run(tmp_path / "once", 2)
    for a, b in zip(jax.tree.leaves(twice.state), jax.tree.leaves(once.state), strict=True):
        np.testing.assert_array_equal(a, b)
