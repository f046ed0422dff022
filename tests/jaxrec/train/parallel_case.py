"""A run small enough for tests, on one device as the library trains it or on many.

The first 300 users of Amazon Beauty where that stands beside the repository, else a walk.
"""

import dataclasses
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxrec.data import Split, leave_one_out, read_sequences, training_batches
from jaxrec.distributed import BalanceConfig
from jaxrec.nn import HSTU, HSTUConfig, SASRec, SASRecConfig
from jaxrec.sharding import make_mesh
from jaxrec.train import (
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    ParallelRun,
    Progress,
    TrainConfig,
    init_state,
    make_optimizer,
    make_schedule,
    make_step,
    train,
)
from jaxrec.train.parallel_batches import GlobalBatches

BEAUTY = Path(__file__).parents[4] / "shared" / "data" / "amazon-beauty" / "sequences.txt"
USERS, MAX_LEN, SOURCES = 300, 24, 8

CONFIG = TrainConfig(
    token_budget=64,
    max_sequences=6,
    loss=LossConfig("sampled", num_negatives=32),
    optimizer=OptimizerConfig(learning_rate=0.05, warmup_steps=3, clip_norm=None, rows="adam"),
    num_epochs=2,
    patience=0,
    checkpoint_every=3,
    seed=3,
)
PARALLEL = ParallelConfig(
    num_sources=SOURCES, balance=BalanceConfig(), prioritized=True, virtual_shards=16
)
PLAIN = dataclasses.replace(PARALLEL, balance=None, prioritized=False)


def user_lines() -> list[str]:
    if BEAUTY.exists():
        with BEAUTY.open() as lines:
            return [next(lines) for _ in range(USERS)]
    rng = np.random.default_rng(0)
    lengths = np.minimum(4 + rng.zipf(1.6, USERS), 60)
    walks = [rng.integers(1, 800) + np.arange(n) * 3 % 90 for n in lengths]
    return [" ".join(map(str, [user, *walk])) + "\n" for user, walk in enumerate(walks)]


@cache
def split() -> Split:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(user_lines())
        file.flush()
        return leave_one_out(read_sequences(file.name, user_column=True))


def make_model(kind: str = "hstu", **options: Any) -> Any:
    sizes: dict[str, Any] = {"num_items": split().train.num_items, "max_len": MAX_LEN, "width": 8}
    sizes |= {"num_blocks": 1, "dropout": 0.0}
    if kind == "hstu":
        return HSTU(HSTUConfig(**sizes | options), rngs=nnx.Rngs(0))
    config = SASRecConfig(**sizes | options, num_attributes=9, attribute_slots=2)
    ids = np.random.default_rng(0).integers(0, 10, (config.num_items + 1, 2))
    return SASRec(config, rngs=nnx.Rngs(0), attribute_ids=ids)


def source_batches(config: TrainConfig = CONFIG):
    return training_batches(
        split().train, mode=config.sampling, max_len=MAX_LEN, token_budget=config.token_budget,
        max_sequences=config.max_sequences, seed=config.seed,
    )  # fmt: skip


def parallel_run(model, parallel=PARALLEL, config=CONFIG, *, devices=8, sampler=None):
    return ParallelRun(
        model, source_batches(config), make_optimizer(config.optimizer), loss=config.loss,
        sampler=sampler, schedule=make_schedule(config.optimizer), seed=config.seed,
        config=parallel, mesh=make_mesh({"data": devices}),
    )  # fmt: skip


def train_steps(run: ParallelRun, count: int):
    """Losses of the first steps, and the state behind them as one device has it."""
    state, losses = run.state, []
    for _ in range(count):
        state, metrics = run.step(state, next(run.batches))
        losses.append(metrics.loss)
    run.batches.close()
    return np.array(jax.device_get(losses)), run.gathered(run.settled(state))


def one_device_steps(model, count: int, config: TrainConfig = CONFIG, *, sampler=None):
    """The same by the library's step for one device, on the same global batches."""
    optimizer = make_optimizer(config.optimizer)
    step = make_step(
        model, optimizer, loss=config.loss, schedule=make_schedule(config.optimizer),
        sampler=sampler,
    )  # fmt: skip
    state, losses = init_state(model, optimizer, seed=config.seed), []
    batches = GlobalBatches(source_batches(config), SOURCES)
    place = batches.start
    for _ in range(count):
        parts, place = batches.read(place)
        state, metrics = step(state, batches.make(parts))
        losses.append(metrics.loss)
    return np.array(jax.device_get(losses)), state


def run_train(folder, model, *, devices=8, **options):
    """`train` for two epochs."""
    mesh = options.pop("mesh", None) or make_mesh({"data": devices})
    config = dataclasses.replace(CONFIG, eval_users=64)
    return train(
        model, split(), config=config, folder=folder, progress=Progress(), parallel=PARALLEL,
        mesh=mesh, **options,
    )  # fmt: skip


class StoppedError(Exception):
    pass


def stops_at(step):
    """An evaluation that ends the run, as a crash would: its step is not saved."""

    def evaluate(state):
        if int(state.step) >= step:
            raise StoppedError
        return {"ndcg@10": 0.0}

    return evaluate
