"""A model and data small enough for tests, and a run of them as a program that can be killed.

python tiny_run.py FOLDER OUTPUT.npz [--kill-at N] [--terminate-at N]
"""

import argparse
import os
import signal
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data import EvalSet, SequenceDataset, training_batches
from jaxrec.data.splits import Split, SplitReport
from jaxrec.train import (
    LoopConfig,
    LossConfig,
    OptimizerConfig,
    Progress,
    init_state,
    make_optimizer,
    make_schedule,
    make_step,
    run_loop,
)
from jaxrec.train.step import parameter_names
from jaxrec.train.train import validation_metrics

NUM_USERS, NUM_ITEMS, WIDTH, MAX_LEN = 60, 40, 8, 8


@dataclass(frozen=True)
class TinyConfig:
    num_items: int = NUM_ITEMS
    max_len: int = MAX_LEN
    compute_dtype: str = "float32"


class TinyModel(nnx.Module):
    """The last item decides: an embedding, dropout and one linear map."""

    def __init__(self, config: TinyConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = jax.random.normal(rngs.params(), (config.num_items + 1, WIDTH))
        self.table = nnx.Param(0.5 * table)
        self.kernel = nnx.Param(0.3 * jax.random.normal(rngs.params(), (WIDTH, WIDTH)))

    def encode(self, batch, *, key=None):
        x = self.table[...][batch.item_ids].astype(self.config.compute_dtype)
        if key is not None:
            x = x * jax.random.bernoulli(key, 0.8, x.shape) / 0.8
        return jnp.tanh(x @ self.kernel[...].astype(x.dtype)) * 3

    def item_embeddings(self):
        return self.table[...]


def tiny_model(seed=0, **config):
    return TinyModel(TinyConfig(**config), rngs=nnx.Rngs(seed))


def tiny_split(seed=0):
    rng = np.random.default_rng(seed)
    starts = rng.integers(1, NUM_ITEMS + 1, NUM_USERS)
    lengths = rng.integers(5, 13, NUM_USERS)
    rows = [
        [int((start + 3 * i - 1) % NUM_ITEMS + 1) for i in range(length)]
        for start, length in zip(starts, lengths, strict=True)
    ]

    def questions(drop):
        histories = SequenceDataset.from_sequences([r[:-drop] for r in rows], num_items=NUM_ITEMS)
        return EvalSet(histories, np.array([r[-drop] for r in rows], np.int32))

    train = SequenceDataset.from_sequences([r[:-2] for r in rows], num_items=NUM_ITEMS)
    report = SplitReport(NUM_USERS, NUM_USERS, NUM_USERS, 0, 0)
    return Split(train, questions(2), questions(1), report)


def tiny_batches(split, seed=0, prefetch=0):
    return iter(
        training_batches(
            split.train,
            mode="sequences",
            max_len=MAX_LEN,
            token_budget=64,
            max_sequences=16,
            seed=seed,
            prefetch=prefetch,
        )
    )


@cache
def compiled_parts(config, loss, ema_decay):
    """What has no state of its own, shared by the tests that ask for the same."""
    split, model, optimizer = tiny_split(), tiny_model(), make_optimizer(config)
    schedule = make_schedule(config)
    step = make_step(model, optimizer, loss=loss, schedule=schedule, ema_decay=ema_decay)
    return split, model, optimizer, step, validation_metrics(model, split.valid)


class Parts:
    """All that `run_loop` needs, made from a seed."""

    batches: Any
    step: Any

    def __init__(
        self, seed=0, *, optimizer=None, loss=None, ema_decay: float | None = 0.9, prefetch=0
    ):
        config = optimizer or OptimizerConfig(learning_rate=0.01, warmup_steps=3)
        compiled = compiled_parts(config, loss or LossConfig(), ema_decay)
        self.split, self.model, self.optimizer, self.step, self.evaluate = compiled
        self.state = init_state(self.model, self.optimizer, seed=seed, ema_decay=ema_decay)
        self.batches = tiny_batches(self.split, seed, prefetch)

    def run(self, folder, config, **options):
        arguments = {
            "config": config,
            "folder": folder,
            "model_config": {"model": {"width": WIDTH}},
            "evaluate": self.evaluate,
            "param_names": parameter_names(self.state.params),
            "progress": Progress(),
        }
        return run_loop(self.state, self.step, self.batches, **arguments | options)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("output")
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--terminate-at", type=int, default=0)
    options = parser.parse_args()
    count = 0

    def put_batch(batch):
        nonlocal count
        count += 1
        if count == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if count == options.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    config = LoopConfig(num_steps=40, eval_every=8, checkpoint_every=3, log_every=5, keep=2)
    result = Parts(prefetch=2).run(options.folder, config, put_batch=put_batch)
    leaves = {f"state{i}": leaf for i, leaf in enumerate(jax.tree.leaves(result.state))}
    assert result.best_step is not None
    best = {f"best{i}": leaf for i, leaf in enumerate(jax.tree.leaves(result.best_state))}
    np.savez(options.output, step=result.best_step, why=result.stopped_because, **leaves, **best)


if __name__ == "__main__":
    main()
