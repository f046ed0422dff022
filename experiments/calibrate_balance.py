"""Measures what a sample costs by its length on this machine, for the balancer.

    python -m experiments.calibrate_balance --save costs.json

A training step of HSTU is timed on batches from many short to few long samples, without padding;
a·L + b·L² + c a sample and a constant a step are fitted to the medians. Use them with

    balance.assign(lengths, num_ranks, cost=balance.CostModel.load("costs.json"))

One JSON file goes to experiments/results/calibrate_balance/.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import record, report
from jaxrec.distributed import balance
from jaxrec.functional import split_params
from jaxrec.nn import HSTU, HSTUConfig
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.ops.losses import sampled_softmax_loss
from pallas_kernels._timing import time_interleaved

NUM_ITEMS, NEGATIVES = 10_000, 128


@dataclass(frozen=True)
class Settings:
    """The model and the batches that are timed: (samples, tokens of each)."""

    width: int = 64
    num_blocks: int = 2
    repeats: int = 9
    steps: tuple[tuple[int, int], ...] = (
        *((8, 16), (128, 16), (16, 128), (64, 64), (4, 256), (16, 256)),
        *((2, 512), (8, 512), (1, 1024), (4, 1024), (2, 2048)),
    )


def main() -> None:
    """Runs the calibration from the command line."""
    parser = argparse.ArgumentParser(description="Fits the balancer's cost model.")
    parser.add_argument("--width", type=int, default=Settings.width)
    parser.add_argument("--blocks", type=int, default=Settings.num_blocks)
    parser.add_argument("--repeats", type=int, default=Settings.repeats)
    parser.add_argument("--save", type=Path, help="where to write the constants for CostModel.load")
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    options = parser.parse_args()
    settings = Settings(options.width, options.blocks, options.repeats)
    run(settings, save=options.save, scratch=options.scratch)


def run(
    settings: Settings, *, save: Path | None = None, scratch: bool = False,
    folder: Path = record.RESULTS,
) -> balance.CostFit:  # fmt: skip
    """Measures, fits, prints and records; returns the fit."""
    began = time.perf_counter()
    steps = [np.full(count, length) for count, length in settings.steps]
    seconds = measure(settings, steps)
    found = balance.fit(steps, seconds)
    rows = [
        {
            "samples": len(lengths),
            "tokens each": int(lengths[0]),
            "measured, ms": 1e3 * measured,
            "fitted, ms": 1e3 * found.model.step_seconds(lengths),
        }
        for lengths, measured in zip(steps, seconds.tolist(), strict=True)
    ]
    report.print_table("a training step", rows)
    print(f"{found.model}\nmedian error {found.median_error:.1%}, worst {found.worst_error:.1%}")
    if save is not None:
        found.model.save(save)
    path = record.write(
        "calibrate_balance",
        config=settings,
        measurements=[
            {"metric": "step", "unit": "ms", "value": row["measured, ms"], **row} for row in rows
        ],
        checks={
            "costs": vars(found.model),
            "median_error": found.median_error,
            "worst_error": found.worst_error,
        },
        wall_s=time.perf_counter() - began,
        scratch=scratch,
        folder=folder,
    )
    print(f"wrote {path}")
    return found


def measure(settings: Settings, steps: Sequence[np.ndarray]) -> np.ndarray:
    """Median seconds of a step on each batch."""
    longest = max(int(lengths.max()) for lengths in steps)
    config = HSTUConfig(
        NUM_ITEMS, longest, width=settings.width, num_blocks=settings.num_blocks, dropout=0.0
    )
    rebuild, params = split_params(HSTU(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    negatives = jax.numpy.asarray(rng.integers(1, NUM_ITEMS + 1, NEGATIVES))

    @jax.jit
    def gradients(params: Any, batch: JaggedBatch) -> Any:
        def loss(params: Any) -> jax.Array:
            model: Any = rebuild(params)
            hidden = model.encode(batch)[batch.target_positions]
            table, targets = model.item_embeddings(), jax.numpy.asarray(batch.target_ids)
            return sampled_softmax_loss(hidden, table, targets, negatives)

        return jax.grad(loss)(params)

    variants = {}
    for number, lengths in enumerate(steps):
        batch = jax.device_put(batch_of(lengths, rng))
        variants[str(number)] = lambda batch=batch: gradients(params, batch)
    timed = time_interleaved(variants, repeats=settings.repeats)
    return np.array([timed[str(number)].p50_us * 1e-6 for number in range(len(steps))])


def batch_of(lengths: np.ndarray, rng: np.random.Generator) -> JaggedBatch:
    """Random samples of these lengths, without padding, with a target at every token."""
    tokens = int(lengths.sum())
    items, targets = rng.integers(1, NUM_ITEMS + 1, (2, tokens)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    times = np.arange(tokens, dtype=np.int32)
    return JaggedBatch(items, offsets, np.arange(tokens, dtype=np.int32), targets, times)


if __name__ == "__main__":
    main()
