"""Models with experts: their losses, statistics and bias in training."""

import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import MAX_LEN, NUM_ITEMS, tiny_batches, tiny_split

from jaxrec.nn import (
    HSTU,
    ExpertBias,
    HSTUConfig,
    MixtureOfLogits,
    MixtureOfLogitsConfig,
    MoEConfig,
    SASRec,
    SASRecConfig,
    TwoStage,
    encode_with_reports,
)
from jaxrec.ops.routing import updated_bias
from jaxrec.train import (
    LossConfig,
    OptimizerConfig,
    OverArchLoss,
    Progress,
    TrainConfig,
    init_state,
    make_optimizer,
    make_rank_fn,
    make_schedule,
    make_step,
    read_log,
    train,
    with_params,
)
from jaxrec.train.config_diff import config_differences
from jaxrec.train.step import parameter_names

EXPERTS = MoEConfig(width=8, num_experts=4, hidden=6, bias_rate=0.01)
ADAM = OptimizerConfig(learning_rate=0.01)


def sasrec(moe: MoEConfig | None = EXPERTS, num_blocks: int = 2, dropout: float = 0.5):
    config = SASRecConfig(
        num_items=NUM_ITEMS, max_len=MAX_LEN, width=8, num_blocks=num_blocks, moe=moe,
        dropout=dropout,
    )  # fmt: skip
    return SASRec(config, rngs=nnx.Rngs(0))


def hstu(moe: MoEConfig | None = EXPERTS, num_blocks: int = 2):
    config = HSTUConfig(
        num_items=NUM_ITEMS, max_len=MAX_LEN, width=8, num_blocks=num_blocks, moe=moe
    )
    return HSTU(config, rngs=nnx.Rngs(0))


OPTIMIZER, SCHEDULE = make_optimizer(ADAM), make_schedule(ADAM)
STEPS = {}
"""By the structure of the model, for what it holds is in the state, and by its loss."""


def parts(model, loss: LossConfig | None = None):
    kind = nnx.graphdef(model), loss or LossConfig()
    if kind not in STEPS:
        STEPS[kind] = make_step(model, OPTIMIZER, loss=kind[1], schedule=SCHEDULE, ema_decay=0.9)
    return init_state(model, OPTIMIZER, seed=0, ema_decay=0.9), STEPS[kind]


def biases(params):
    return [np.asarray(bias) for bias in jax.tree.leaves(nnx.filter_state(params, ExpertBias))]


@nnx.jit
def encoded(model, batch, key=None):
    return encode_with_reports(model, batch, key=key)


def batch():
    return next(tiny_batches(tiny_split()))


@pytest.mark.parametrize("make", [sasrec, pytest.param(hstu, marks=pytest.mark.slow)])
def test_balancing_losses_are_part_of_the_loss_with_their_weights(make):
    def first(**weights):
        moe = replace(EXPERTS, **{"balance_weight": 0.0, "z_weight": 0.0} | weights)
        state, step = parts(make(moe, num_blocks=1))
        return jax.device_get(step(state, batch())[1])

    plain = first()
    assert [float(router.loss) for router in plain.routers] == [0]
    metrics = first(balance_weight=0.5)
    losses = [float(router.loss) for router in metrics.routers]
    # Random routers are nearly even, where the loss is its weight.
    np.testing.assert_allclose(losses, 0.5, rtol=0.3)
    np.testing.assert_allclose(metrics.loss - plain.loss, sum(losses), rtol=1e-4)
    heavy = first(sequence_weight=100.0)  # segments reach the routers
    assert heavy.loss > plain.loss + 100
    assert heavy.grad_norm > 2 * plain.grad_norm


def test_a_balancing_loss_balances():
    def max_over_mean(weight):
        # A router that starts out unfair: every token prefers the first two experts.
        model = sasrec(
            replace(EXPERTS, balance_weight=weight, bias_rate=0.0), num_blocks=1, dropout=0.0
        )
        for layer in model.moe_layers():
            layer.router.kernel[...] = layer.router.kernel[...].at[:, :2].multiply(8.0)
        state, step = parts(model)
        batches, found = tiny_batches(tiny_split()), []
        for _ in range(60):
            state, metrics = step(state, next(batches))
            found.append(float(metrics.routers[0].stats.max_over_mean))
        return np.mean(found[-10:])

    assert max_over_mean(1.0) < 1.25 < max_over_mean(0.0)


def test_bias_moves_against_the_load_and_is_evaluated():
    model = sasrec()
    state, step = parts(model)
    before = biases(state.params)
    state, metrics = step(state, batch())
    assert len(before) == len(metrics.routers) == 2
    for old, new, router in zip(before, biases(state.params), metrics.routers, strict=True):
        wanted = updated_bias(jnp.asarray(old), router.stats.load, rate=0.01)
        np.testing.assert_array_equal(new, wanted)
        assert np.abs(new).max() > 0
    for averaged, own in zip(biases(state.eval_params), biases(state.params), strict=True):
        np.testing.assert_array_equal(averaged, own)
    weights, bias = nnx.split_state(state.params, nnx.Param, ExpertBias)
    bias = jax.tree.map(lambda leaf: 100.0 * jnp.arange(leaf.size), bias)
    preferred = nnx.merge_state(weights, bias)
    _, reports = encoded(with_params(model, preferred), batch())
    np.testing.assert_array_equal(reports[0].stats.load[:2], 0)  # the last two are preferred
    rank, (question, ids) = make_rank_fn(model), (batch(), np.zeros((16, 1), np.int32))
    question = question._replace(target_positions=np.arange(16), target_ids=np.ones(16, np.int32))
    ranks = [rank(params, question, ids) for params in (state.params, preferred)]
    assert (np.asarray(ranks[0]) != np.asarray(ranks[1])).any()


def test_a_step_that_is_not_finite_leaves_the_bias():
    state, step = parts(sasrec())
    names = parameter_names(state.params)
    assert not any("expert_bias" in name for name in names)
    poisoned = state.params["blocks"][1]["moe"]["experts"]["w_up"]
    poisoned[...] = poisoned[...] * jnp.nan
    new, metrics = step(state, batch())
    assert 0 <= metrics.nonfinite <= names.index("blocks.1.moe.experts.w_up")
    assert not any(bias.any() for bias in biases(new.params))


CONFIG = TrainConfig(token_budget=64, max_sequences=16, num_epochs=4, ema_decay=0.9, patience=9)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits_and_one_log(tmp_path):
    def run(folder, epochs):
        config = replace(CONFIG, num_epochs=epochs)
        return train(sasrec(), tiny_split(), config=config, folder=folder, progress=Progress())

    unbroken = run(tmp_path / "one", 4)
    run(tmp_path / "two", 2)
    resumed = run(tmp_path / "two", 4)
    assert len(biases(unbroken.state.params)) == 2
    for a, b in zip(jax.tree.leaves(unbroken.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = read_log(tmp_path / "one", "train")
    for number in range(2):
        loads = np.array([line[f"router/{number}/load"] for line in lines])
        np.testing.assert_allclose(loads.sum(axis=1), 1, rtol=1e-6)
        largest = np.array([line[f"router/{number}/max_over_mean"] for line in lines])
        assert (largest >= 4 * loads.max(axis=1) - 1e-6).all()  # the mean of maxima is the larger
        for name in ("loss", "entropy", "dead_experts", "dropped"):
            assert all(np.isfinite(line[f"router/{number}/{name}"]) for line in lines)
    last = read_log(tmp_path / "two", "train")[-1]
    assert last["router/1/load"] == lines[-1]["router/1/load"]


def test_an_option_that_came_later_differs_only_when_used():
    assert config_differences({"width": 8}, {"width": 8, "moe": None}) == []
    assert config_differences({"moe": None}, {"moe": {"slots": 2}}) == [
        "moe.slots: saved absent, now 2"
    ]


@pytest.mark.parametrize("model", [sasrec(), hstu(), sasrec(None)])
def test_configurations_survive_json(model):
    read = json.loads(json.dumps(asdict(model.config)))
    assert type(model.config).from_dict(read) == model.config
    del read["moe"]  # stored before there were experts
    assert type(model.config).from_dict(read).moe is None


def test_experts_of_another_width_are_refused():
    for config in (SASRecConfig, HSTUConfig):
        with pytest.raises(ValueError, match=rf"{config.__name__}: moe.width is 8, the model's 64"):
            config(num_items=1, moe=EXPERTS)


def test_dense_models_draw_what_they_drew():
    """Dense blocks have no router, no bias, and the parameters of before."""
    for model in (sasrec(None, num_blocks=1), hstu(None, num_blocks=1)):
        state, step = parts(model)
        assert biases(state.params) == []
        assert not any("moe" in name for name in parameter_names(state.params))
        assert step(state, batch())[1].routers == ()
        assert model.moe_layers() == []


def test_towers_with_experts_train_beside_an_overarch():
    overarch = MixtureOfLogits(MixtureOfLogitsConfig(width=8), rngs=nnx.Rngs(1))
    state, step = parts(
        TwoStage(sasrec(num_blocks=1), overarch), LossConfig(overarch=OverArchLoss())
    )
    state, metrics = step(state, batch())
    assert len(metrics.routers) == 1
    assert all(bias.any() for bias in biases(state.params))
    plain = TwoStage(sasrec(None, num_blocks=1), overarch)
    assert encoded(plain, batch())[1] == ()


def test_noise_only_in_training():
    noisy = replace(EXPERTS, noise=True, balance_weight=0.0, z_weight=0.0)
    for make in (sasrec, hstu):
        model = make(noisy, num_blocks=1)
        for layer in model.moe_layers():
            assert layer.spread is not None
            layer.spread.kernel[...] += 5.0
        calm = [encoded(model, batch())[0] for _ in range(2)]
        np.testing.assert_array_equal(calm[0], calm[1])
        loads = [
            encoded(model, batch(), jax.random.key(seed))[1][0].stats.load for seed in range(2)
        ]
        assert (np.asarray(loads[0]) != np.asarray(loads[1])).any()
