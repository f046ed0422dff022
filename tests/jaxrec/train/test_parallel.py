"""Training over many devices is training on one with the same global batches."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parallel_case import (
    CONFIG,
    MAX_LEN,
    PARALLEL,
    PLAIN,
    StoppedError,
    make_model,
    one_device_steps,
    parallel_run,
    run_train,
    split,
    stops_at,
    train_steps,
)
from parallel_worker import STEPS
from processes import ended, free_port, python, started

from jaxrec.data import PopularitySampler, item_counts
from jaxrec.distributed import BalanceConfig, ShardedTables
from jaxrec.nn import MoEConfig
from jaxrec.sharding import make_mesh
from jaxrec.train import (
    LossConfig,
    NonFiniteError,
    OptimizerConfig,
    Progress,
    evaluate_ranking,
    make_rank_fn,
    read_log,
    train,
    with_params,
)
from jaxrec.train.train import spread

WORKER = Path(__file__).with_name("parallel_worker.py")


def assert_close(one, other, relative=1e-4):
    """Alike in parts of the largest value; the padding row, which nobody reads, aside."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    num_rows = split().train.num_items + 1
    for a, b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        if b.ndim and b.shape[0] == num_rows:
            a, b = a[1:], b[1:]
        np.testing.assert_allclose(a, b, rtol=relative, atol=relative * np.abs(b).max(initial=0))


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_balanced_and_prioritised_on_eight_devices_is_one_device():
    model = make_model()
    losses, state = train_steps(parallel_run(model), 12)
    wanted, whole = one_device_steps(model, 12)
    assert wanted[-1] < wanted[0] - 0.1
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert_close(state, whole)


def test_attributes_popular_negatives_adagrad_and_an_exchange_that_grows(monkeypatch):
    model = make_model("sasrec")
    loss = LossConfig("sampled", 32, negatives="popularity")
    config = replace(CONFIG, loss=loss, optimizer=replace(CONFIG.optimizer, rows="adagrad"))
    sampler = PopularitySampler.from_counts(item_counts(split().train))
    monkeypatch.setattr(ShardedTables, "start_capacity", lambda *_: {"items": 8})
    run = parallel_run(model, PLAIN, config, devices=4, sampler=sampler)
    losses, state = train_steps(run, 4)
    assert run.step.retries > 0
    wanted, whole = one_device_steps(model, 4, config, sampler=sampler)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert_close(state, whole)


def test_a_step_that_is_not_finite_changes_nothing_and_is_named(tmp_path):
    model = make_model()
    model.norm.bias[...] = jnp.full_like(model.norm.bias[...], jnp.nan)
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient or the new value of 'blocks"):
        run_train(tmp_path, model)
    for parallel in (PARALLEL, PLAIN):
        _, state = train_steps(parallel_run(model, parallel), 2)
        assert_same(state.params, nnx.state(model, nnx.Param))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_devices_without_samples_and_outliers_held_through_a_restart():
    """Long samples wait until there is one for each device; meanwhile some devices have nothing."""
    config = replace(CONFIG, token_budget=MAX_LEN, max_sequences=1)
    balance = BalanceConfig(outlier_tokens=4, outliers="defer")
    run = parallel_run(make_model(), replace(PARALLEL, balance=balance), config)
    samples = [np.diff(next(run.batches).batch.ranks.batch.seq_offsets) > 0 for _ in range(3)]
    assert any((used.sum(1) == 0).any() for used in samples)
    place = json.loads(json.dumps(run.batches.get_state()))
    following = [next(run.batches) for _ in range(4)]
    run.batches.set_state(place)
    assert_same([next(run.batches) for _ in range(4)], following)
    run.batches.set_state(place)
    losses, _ = train_steps(run, 3)
    assert np.isfinite(losses).all()
    with pytest.raises(ValueError, match=r"the run holds \d+ outliers back"):
        parallel_run(make_model(), PLAIN, config).batches.set_state(
            place | {"held": [[[[1, 0, 2]]]]}
        )


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits_and_metrics_are_those_of_one_device(tmp_path):
    model = make_model("sasrec", dropout=0.2)
    whole = run_train(tmp_path / "whole", model)
    with pytest.raises(StoppedError):
        run_train(tmp_path / "stopped", model, evaluate=stops_at(5))
    assert_same(run_train(tmp_path / "stopped", model), whole)
    trained = with_params(model, whole.best_state.eval_params)
    questions = spread(split().valid, 64)
    rank_fn, params = make_rank_fn(trained), nnx.state(trained, nnx.Param)
    metrics = evaluate_ranking(rank_fn, params, questions, max_len=MAX_LEN)
    best = next(entry for entry in whole.history if entry["step"] == whole.best_step)
    assert metrics == {name: value for name, value in best.items() if name != "step"}


def run_processes(count: int, devices: int, folder: Path) -> list[dict[str, np.ndarray]]:
    """What each of `count` processes wrote."""
    port = free_port()
    calls = [python(WORKER, number, count, port, devices, folder) for number in range(count)]
    with started(calls) as workers:
        for worker in workers:
            end = ended(worker, timeout=280)
            assert end.code == 0, end.errors[-2_000:]
    return [dict(np.load(folder / f"{number}.npz")) for number in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_processes_train_as_one_and_another_number_of_devices_goes_on(processes, devices, tmp_path):
    model = make_model()
    written = run_processes(processes, devices, tmp_path)
    wanted, whole = one_device_steps(model, STEPS)
    for process in written:
        np.testing.assert_allclose(process.pop("losses"), wanted, rtol=1e-5)
        assert_close([process[str(n)] for n in range(len(process))], jax.tree.leaves(whole))
    if devices == 1:
        return
    resumed = run_train(tmp_path / "run", model, devices=8)  # from step 6, on twice the devices
    wanted, whole = one_device_steps(model, int(resumed.state.step))
    (line,) = read_log(tmp_path / "run", "train")
    np.testing.assert_allclose(line["loss"], wanted.mean(), rtol=1e-6)
    assert_close(resumed.state, whole, 1e-3)  # Adam makes much of roundings of small gradients


EXPERTS = MoEConfig(width=8, num_experts=4, hidden=6)
BAD = {
    "no axis": ({"axis": "model"}, {}, {}, r"the mesh has no axis 'model'; it has data"),
    "not dividing": ({"num_sources": 12}, {}, {}, r"8 devices .* do not divide num_sources=12"),
    "shards": ({"virtual_shards": 20}, {}, {}, r"virtual_shards is 20; expected a multiple of"),
    "full": ({}, {"loss": LossConfig()}, {}, r"the full softmax scores every item"),
    "per target": ({}, {"loss": LossConfig("gbce", per_target=True)}, {}, r"per_target draws"),
    "all rows": ({}, {"optimizer": OptimizerConfig()}, {}, r'OptimizerConfig\(rows="adam"\)'),
    "average": ({}, {"ema_decay": 0.9}, {}, r"ema_decay=0.9 averages every item row"),
    "buckets": ({}, {"token_buckets": 2}, {}, r"token_buckets gives batches several sizes"),
    "experts": ({}, {}, {"moe": EXPERTS}, r"a model with experts is trained on one device"),
    "too long": ({"balance": BalanceConfig(token_budget=9)}, {}, {}, r"more than a rank's token"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name, tmp_path):
    parallel, config, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        train(
            make_model(**options), split(), config=replace(CONFIG, **config), folder=tmp_path,
            parallel=replace(PARALLEL, **parallel), mesh=make_mesh({"data": 8}),
            progress=Progress(),
        )  # fmt: skip


def test_two_axes_and_a_mesh_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected 'data' to be its only axis above 1"):
        run_train(tmp_path, make_model(), mesh=make_mesh({"data": 4, "model": 2}))
    with pytest.raises(ValueError, match=r"needs both parallel=ParallelConfig"):
        train(make_model(), split(), config=CONFIG, folder=tmp_path, mesh=make_mesh({"data": 8}))
