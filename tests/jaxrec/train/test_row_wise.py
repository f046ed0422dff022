"""Steps that train only the item rows they name, beside steps that train all of them."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_run import MAX_LEN, NUM_ITEMS, tiny_batches, tiny_model, tiny_split

from jaxrec.nn import MLPOverArch, MLPOverArchConfig, TwoStage
from jaxrec.nn.layers import ItemEmbedding
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


@dataclass(frozen=True)
class TowersConfig:
    num_items: int = ITEMS
    max_len: int = MAX_LEN
    width: int = 8


class Towers(nnx.Module):
    """The last item decides, as in `TinyModel`, with the library's own item embedding."""

    def __init__(self, *, num_items=ITEMS, width=8, **attributes):
        self.config = TowersConfig(num_items, width=width)
        self.items = ItemEmbedding(num_items, width, rngs=nnx.Rngs(0), std=0.5, **attributes)
        self.kernel = nnx.Param(0.3 * jax.random.normal(jax.random.key(1), (width, width)))

    def encode(self, batch, *, key=None):
        x = self.items(jnp.asarray(batch.item_ids))
        if key is not None:
            x = x * jax.random.bernoulli(key, 0.8, x.shape)
        return jnp.tanh(x @ self.kernel[...]) * 3

    def item_embeddings(self):
        return self.items.rows()


def with_attributes():
    ids = np.random.default_rng(0).integers(0, 6, (ITEMS + 1, 2)).astype(np.int32)
    return Towers(num_attributes=5, attribute_slots=2, attribute_ids=ids)


def two_stage():
    return TwoStage(Towers(), MLPOverArch(MLPOverArchConfig(8, (4,)), rngs=nnx.Rngs(3)))


SAMPLED = LossConfig("sampled", num_negatives=12)
CASES = {
    "gbce, per target": (Towers, LossConfig("gbce", num_negatives=3, per_target=True)),
    "attributes": (with_attributes, SAMPLED),
    "overarch": (two_stage, LossConfig("sampled", 6, overarch=OverArchLoss(num_negatives=5))),
}


def steps(model, optimizer, loss, count=2):
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
    model, optimizer = Towers(), make_optimizer(config)
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
    state = init_state(Towers(), optimizer, seed=0)
    table = state.params["items"]["table"]
    batch = next(tiny_batches(tiny_split()))
    item = int(batch.item_ids[0])
    table[...] = table[...].at[item, 0].set(jnp.nan)
    before = jax.device_get(state)
    step = make_step(Towers(), optimizer, loss=SAMPLED, schedule=lambda _: 0.1)
    state, metrics = step(state, batch)
    assert int(metrics.nonfinite) >= 0
    assert int(state.step) == 1
    pairs = map(jax.tree.leaves, (before._replace(step=0), state._replace(step=0)))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_array_equal(a, b)


def compiled_step(num_items) -> Any:
    """The step of a model with so many items, from shapes alone."""
    optimizer = make_optimizer(OptimizerConfig(rows="adam"))
    model = nnx.eval_shape(lambda: Towers(num_items=num_items, width=64))
    state = jax.eval_shape(
        lambda: init_state(Towers(num_items=num_items, width=64), optimizer, seed=0)
    )
    loss = LossConfig("sampled", num_negatives=256)
    step = make_step(model, optimizer, loss=loss, schedule=lambda _: 0.1)
    shapes: Any = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (512, 65)]
    slots, offsets = shapes
    return step.lower(state, JaggedBatch(slots, offsets, slots, slots, slots)).compile()


def test_nothing_in_a_step_is_as_large_as_the_catalogue():
    large, small = compiled_step(4_000_000), compiled_step(40_000)
    memory, expected = large.memory_analysis(), small.memory_analysis()
    assert memory.temp_size_in_bytes <= expected.temp_size_in_bytes + (64 << 10)
    assert memory.alias_size_in_bytes >= 3 * 4 * 64 * 4_000_001, "table and moments in place"
    made = re.findall(r"= f32\[4000001,64\]\S* (\S+)\(", large.as_text())
    assert made.count("parameter") >= 3
    assert "copy" not in made
    assert "broadcast" not in made, "such as the zeros that a dense gradient begins with"


@pytest.mark.parametrize(
    ("loss", "ema_decay", "message"),
    [(LossConfig("full"), None, "every item"), (SAMPLED, 0.9, "averages every row")],
)
def test_what_touches_every_row_is_refused(loss, ema_decay, message):
    optimizer = make_optimizer(OptimizerConfig(rows="adam"))
    with pytest.raises(ValueError, match=message):
        make_step(Towers(), optimizer, loss=loss, schedule=lambda _: 0.1, ema_decay=ema_decay)


def test_models_without_item_rows_are_refused():
    optimizer = make_optimizer(OptimizerConfig(rows="adam"))
    with pytest.raises(ValueError, match="0 tables of item rows"):
        init_state(tiny_model(), optimizer, seed=0)


@pytest.mark.slow
def test_a_run_is_resumed_to_the_bit(tmp_path):
    def run(folder, epochs):
        config = TrainConfig(
            token_budget=64, max_sequences=16, num_epochs=epochs, loss=SAMPLED,
            optimizer=OptimizerConfig(rows="adagrad", learning_rate=0.05),
        )  # fmt: skip
        return train(Towers(), tiny_split(), config=config, folder=folder, progress=Progress())

    run(tmp_path / "twice", 1)
    twice, once = run(tmp_path / "twice", 2), run(tmp_path / "once", 2)
    for a, b in zip(jax.tree.leaves(twice.state), jax.tree.leaves(once.state), strict=True):
        np.testing.assert_array_equal(a, b)
