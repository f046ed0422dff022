"""Towers and over-arch trained together, and the ranking they give."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_run import MAX_LEN, NUM_ITEMS, WIDTH, tiny_model, tiny_split

from jaxrec.data import UniformSampler, make_query_batch
from jaxrec.functional import copy_params
from jaxrec.nn import (
    AttentionOverArch,
    AttentionOverArchConfig,
    MixtureOfLogits,
    MixtureOfLogitsConfig,
    MLPOverArch,
    MLPOverArchConfig,
    TwoStage,
)
from jaxrec.ops.losses import NEVER, sampled_softmax_loss, scored_softmax_loss
from jaxrec.train import (
    LossConfig,
    OptimizerConfig,
    OverArchLoss,
    Progress,
    TrainConfig,
    init_state,
    make_rank_fn,
    make_rerank_fn,
    make_step,
    train,
    user_ranks,
    with_params,
)
from jaxrec.train.objective import Negatives, overarch_loss


@dataclass(frozen=True)
class WideConfig:
    """TinyModel's configuration with the width that a two-stage model compares."""

    num_items: int = NUM_ITEMS
    max_len: int = MAX_LEN
    compute_dtype: str = "float32"
    width: int = WIDTH


def towers(**config):
    model = tiny_model(**config)
    model.config = WideConfig(**config)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def mixture(**kwargs):
    sizes: dict[str, Any] = {"component_width": 4, "gate_hidden": 4, **kwargs}
    return MixtureOfLogits(MixtureOfLogitsConfig(WIDTH, 2, 2, **sizes), rngs=nnx.Rngs(3))


def mlp():
    return MLPOverArch(MLPOverArchConfig(WIDTH, (8,)), rngs=nnx.Rngs(3))


def attention():
    return AttentionOverArch(AttentionOverArchConfig(WIDTH, hidden=8), rngs=nnx.Rngs(3))


EVERY = [mixture, mlp, attention]
LOSS = LossConfig(overarch=OverArchLoss(num_negatives=24))


class AllItems(UniformSampler):
    """Draws item 1, 2, 3 … once each: the sampled softmax is then the full one."""

    def draw(self, key, shape):
        return jnp.arange(shape[0], dtype=jnp.int32) + 1


def all_items():
    return AllItems.create(NUM_ITEMS)


def test_loss_of_the_dot_product_is_the_sampled_softmax():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(7, WIDTH)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(NUM_ITEMS + 1, WIDTH)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, NUM_ITEMS + 1, 7))
    sampler = all_items()
    config = OverArchLoss(weight=0.5, num_negatives=NUM_ITEMS)
    negatives = sampler.draw(jax.random.key(0), (NUM_ITEMS,))
    expected = sampled_softmax_loss(
        hidden, table, targets, negatives, log_q=jnp.asarray(sampler.log_q)
    )
    for make in EVERY:  # all start as the dot product
        overarch = make()
        loss = jax.jit(
            lambda hidden, table, targets, drawn, own=overarch: overarch_loss(
                config, own, hidden, table, targets, drawn
            )
        )
        drawn = Negatives(negatives, jnp.asarray(sampler.log_q))
        got = loss(hidden, table, targets, drawn)
        np.testing.assert_allclose(got, 0.5 * expected, rtol=1e-5)


def test_scored_softmax_drops_targets_and_padding_among_the_negatives():
    negatives = jnp.asarray([1, 2, 0])
    scores = jnp.asarray([[3.0, 1.0, 9.0]])
    loss = scored_softmax_loss(jnp.asarray([2.0]), scores, jnp.asarray([1]), negatives)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-1)), rtol=1e-6)
    masked = jnp.asarray([[-jnp.inf, 1.0, NEVER]])
    np.testing.assert_allclose(
        scored_softmax_loss(jnp.asarray([2.0]), masked, jnp.asarray([1]), negatives), loss
    )


@pytest.mark.parametrize("make", EVERY)
def test_training_moves_towers_and_overarch_and_helps(make, tmp_path):
    model, split = TwoStage(towers(), make()), tiny_split()
    config = TrainConfig(
        token_budget=64, max_sequences=16, loss=LOSS, num_epochs=8, eval_every=8,
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )  # fmt: skip
    result = train(model, split, config=config, folder=tmp_path, progress=Progress())
    before, after = nnx.to_flat_state(copy_params(model)), nnx.to_flat_state(result.state.params)
    for (path, old), (_, new) in zip(before, after, strict=True):
        if path[-1] != "own_parts":
            assert (np.asarray(old[...]) != np.asarray(new[...])).any(), path
    ranks = [
        user_ranks(make_rerank_fn(model, num_candidates=NUM_ITEMS), params, split.test, max_len=8)
        for params in (nnx.state(model, nnx.Param), result.best_state.eval_params)
    ]
    assert ranks[1].mean() < 0.5 * ranks[0].mean()


def test_gradient_stays_out_of_the_towers_on_request():
    split = tiny_split()
    batch = make_query_batch(
        split.train, np.arange(8), max_len=MAX_LEN, token_budget=64, max_sequences=8,
        targets=split.test.targets,
    )  # fmt: skip
    for train_towers in (False, True):
        loss = OverArchLoss(num_negatives=8, train_towers=train_towers)

        def of(params, loss=loss):
            model: Any = with_params(TwoStage(towers(), mixture(scale=1.0)), params)
            hidden = model.encode(batch)[batch.target_positions]
            targets, sampler = jnp.asarray(batch.target_ids), all_items()
            drawn = Negatives(jnp.arange(8) + 1, jnp.asarray(sampler.log_q))
            table = model.item_embeddings()
            return overarch_loss(loss, model.overarch, hidden, table, targets, drawn)

        grads = jax.jit(jax.grad(of))(nnx.state(TwoStage(towers(), mixture(scale=1.0)), nnx.Param))
        moved = any(np.asarray(g).any() for g in jax.tree.leaves(grads["towers"]))
        assert moved is train_towers


def test_an_overarch_and_its_loss_come_together():
    optimizer, schedule = optax.sgd(0.1), optax.constant_schedule(0.1)
    for model, loss in ((TwoStage(towers(), mlp()), LossConfig()), (towers(), LOSS)):
        with pytest.raises(ValueError, match="OverArchLoss"):
            make_step(model, optimizer, loss=loss, schedule=schedule)
    with pytest.raises(ValueError, match="num_negatives is 0"):
        OverArchLoss(num_negatives=0)
    with pytest.raises(ValueError, match="weight is 0"):
        OverArchLoss(weight=0.0)
    assert init_state(towers(), optimizer, seed=0).step == 0


@pytest.mark.parametrize("num_candidates", [5, NUM_ITEMS, 500])
def test_reranking_equals_a_naive_one(num_candidates):
    model, questions = TwoStage(towers(), mixture(scale=0.5)), tiny_split().test
    params = nnx.state(model, nnx.Param)
    rerank = make_rerank_fn(model, num_candidates=num_candidates, block=7)
    got = user_ranks(rerank, params, questions, max_len=MAX_LEN)
    by_dot = user_ranks(make_rank_fn(model), params, questions, max_len=MAX_LEN)
    table = model.item_embeddings()
    components = jax.tree.map(np.asarray, model.overarch.item_components(table))
    score = jax.jit(model.overarch.__call__)
    for user, target in list(enumerate(questions.targets))[:12]:
        batch = make_query_batch(
            questions.histories, np.array([user]), max_len=MAX_LEN, token_budget=MAX_LEN,
            max_sequences=1, targets=questions.targets,
        )  # fmt: skip
        hidden = model.encode(batch)[batch.target_positions]
        history = set(questions.histories.sequence(user).tolist()) - {int(target)}
        allowed = np.array([i for i in range(1, NUM_ITEMS + 1) if i not in history])
        dots = np.asarray(table @ hidden[0])[allowed]
        chosen = allowed[np.argsort(-dots, kind="stable")[:num_candidates]]
        if target not in chosen:
            assert got[user] == by_dot[user] >= num_candidates
            continue
        # Filled up with invalid candidates, so that all users share one program.
        padded = np.zeros(NUM_ITEMS, np.int32)
        padded[: len(chosen)] = chosen
        rows = jax.tree.map(lambda column, padded=padded: column[padded][None], components)
        valid = np.arange(NUM_ITEMS)[None] < len(chosen)
        scores = np.asarray(score(hidden, rows, valid))[0, : len(chosen)]
        ours = scores[chosen == target][0]
        assert got[user] == (scores[chosen != target] >= ours).sum()
