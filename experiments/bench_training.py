"""Times whole training steps beside the same models in PyTorch.

    python -m experiments.bench_training --record
    python -m experiments.bench_training --cases ml1m_hstu --repeats 20
    python -m experiments.bench_training --quick --scratch    # small: a minute on a CPU

A step is loss, gradients, clipping, Adam and averaged weights on a batch that is on the device.
Lengths follow Zipf's law (exponent 1.2) and are packed into the batch's token slots; PyTorch has
the same sequences, padded to the longest, and the same first weights. Before anything is timed, the
states of all tokens must agree. Variants:

  ours                 each HSTU block keeps what `HSTUConfig.save` keeps by default
  ours, <policy>       another of `jaxrec.ops.hstu_block`; "automatic": automatic differentiation
  torch, torch.compile eager, and, where asked for or on a GPU, compiled

PyTorch is no dependency: without it, its variants are left out. MFU is the share of the device's
bf16 peak that the model's own FLOPs take, where that peak is known.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import record, report
from experiments.torch_training import PaddedBatch, TorchTraining
from jaxrec.functional import copy_params
from jaxrec.nn import HSTU, HSTUConfig, SASRec, SASRecConfig
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.train import (
    LossConfig,
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_schedule,
    make_step,
    peak_flops,
    training_flops,
)
from pallas_kernels._timing import Timing, time_interleaved

SEED = 0
NUM_BATCHES = 4
EMA_DECAY = 0.999
OPTIMIZER = OptimizerConfig()
TOLERANCE = {"float32": 1e-3, "bfloat16": 6e-2}  # of the largest state
PEERS = ("torch", "torch.compile")
POLICIES = {"automatic": None, "attended": "attended", "x": "x"}


@dataclass(frozen=True)
class Case:
    """A model and its batches.

    Attributes:
      shortest: of the lengths' law; the longest is the model's max_len.
      num_tokens, num_sequences: slots of a batch.
    """

    model: HSTUConfig | SASRecConfig
    num_tokens: int
    num_sequences: int
    shortest: int = 2
    loss: LossConfig = field(default_factory=LossConfig)

    def batches(self) -> list[JaggedBatch]:
        """Different ones of one shape, on the device."""
        rng = np.random.default_rng(SEED)
        return [jax.device_put(self._batch(rng)) for _ in range(NUM_BATCHES)]

    def _batch(self, rng: np.random.Generator) -> JaggedBatch:
        choices = np.arange(self.shortest, self.model.max_len + 1)
        weights = choices**-1.2
        lengths = rng.choice(choices, self.num_sequences, p=weights / weights.sum())
        ends = np.cumsum(lengths)
        ends = np.append(0, np.where(ends <= self.num_tokens, ends, 0))
        offsets = np.maximum.accumulate(ends).astype(np.int32)
        used = offsets[-1]
        ids, targets = rng.integers(1, self.model.num_items + 1, (2, self.num_tokens), np.int32)
        ids[used:] = targets[used:] = 0
        slots = np.arange(self.num_tokens, dtype=np.int32)
        return JaggedBatch(ids, offsets, slots, targets, np.zeros_like(slots))


def cases() -> dict[str, Case]:
    """Published settings' shapes, and one that fills a GPU."""
    small: dict[str, Any] = {"num_items": 12_101, "max_len": 50, "dropout": 0.5}
    medium: dict[str, Any] = {"num_items": 3416, "max_len": 200, "dropout": 0.2}
    large = HSTUConfig(
        100_000, max_len=4096, width=1024, num_blocks=8, num_heads=8, dropout=0.2,
        compute_dtype="bfloat16",
    )  # fmt: skip
    sampled = LossConfig("sampled", num_negatives=1024)
    return {
        "beauty_sasrec": Case(SASRecConfig(**small), 1024, 256),
        "beauty_hstu": Case(HSTUConfig(**small), 1024, 256),
        "ml1m_sasrec": Case(SASRecConfig(**medium), 4096, 128),
        "ml1m_hstu": Case(HSTUConfig(**medium, num_heads=2), 4096, 128),
        "large_hstu": Case(large, 32_768, 32, shortest=64, loss=sampled),
    }


ON_CPU = ("beauty_sasrec", "beauty_hstu", "ml1m_sasrec", "ml1m_hstu")


def quick(case: Case) -> Case:
    """The same kind of model at sizes for a test."""
    model = replace(case.model, num_items=50, max_len=12, width=16, num_blocks=1, num_heads=2)
    loss = replace(case.loss, num_negatives=8)
    return replace(case, model=model, num_tokens=64, num_sequences=8, shortest=2, loss=loss)


class Pending:
    """A result of PyTorch's that `jax.block_until_ready` waits for."""

    def block_until_ready(self) -> "Pending":
        """Waits for the GPU, if there is one."""
        import torch  # pyright: ignore[reportMissingImports]

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


def build(case: Case, **changes: Any) -> HSTU | SASRec:
    """The model, with another saving policy for example."""
    config = replace(case.model, **changes)
    kind: Any = HSTU if isinstance(config, HSTUConfig) else SASRec
    return kind(config, rngs=nnx.Rngs(SEED))


def our_step(case: Case, batches: list[JaggedBatch], **changes: Any) -> tuple[Any, int]:
    """A function that trains on the next batch, and the program's peak bytes."""
    model, optimizer = build(case, **changes), make_optimizer(OPTIMIZER)
    state = init_state(model, optimizer, seed=SEED, ema_decay=EMA_DECAY)
    schedule = make_schedule(OPTIMIZER)
    step = make_step(model, optimizer, loss=case.loss, schedule=schedule, ema_decay=EMA_DECAY)
    analysis: Any = step.lower(state, batches[0]).compile().memory_analysis()
    following = cycle(batches)

    def run() -> jax.Array:
        nonlocal state
        state, metrics = step(state, next(following))
        return metrics.loss

    return run, analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def torch_step(
    case: Case, batches: list[JaggedBatch], checks: dict[str, Any], *, compiled: bool
) -> Callable[[], Pending]:
    """The same in PyTorch, after its states were compared with ours.

    Raises:
      ImportError: PyTorch is missing.
      SystemExit: the states differ.
    """
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = build(case)
    training = TorchTraining(
        case.model, copy_params(model), loss=case.loss, optimizer=OPTIMIZER,
        ema_decay=EMA_DECAY, compiled=compiled,
    )  # fmt: skip
    padded = [PaddedBatch.of(batch) for batch in batches]
    checks["torch"] = error = _state_error(case, model, training, batches[0], padded[0])
    if not error < TOLERANCE[case.model.compute_dtype]:
        raise SystemExit(f"PyTorch's states differ by {error:.2g} of the largest")
    following: Iterator[PaddedBatch] = cycle(padded)
    training.step(padded[0])

    def run() -> Pending:
        training.step(next(following))
        return Pending()

    return run


def _state_error(
    case: Case, model: Any, training: TorchTraining, batch: JaggedBatch, padded: PaddedBatch
) -> float:
    """Largest difference of a state's element, as a share of the largest one; without dropout."""
    import torch  # pyright: ignore[reportMissingImports]

    half = case.model.compute_dtype == "bfloat16"
    with torch.no_grad(), torch.autocast(padded.ids.device.type, torch.bfloat16, enabled=half):
        theirs = training.hidden(padded, dropout=0.0).float().cpu().numpy()
    ours = np.asarray(jax.jit(model.encode)(batch), np.float32)[: len(theirs)]
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


@dataclass(frozen=True)
class Measured:
    """One variant of a case; `peak` bytes are known of ours alone."""

    timing: Timing
    peak: int | None


def measure(
    case: Case, repeats: int, *, policies: Sequence[str], peers: Sequence[str]
) -> tuple[dict[str, Measured], dict[str, Any]]:
    """Every variant that runs, and what was checked, or why it does not run."""
    batches, checks = case.batches(), {}
    calls: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int] = {}
    calls["ours"], peaks["ours"] = our_step(case, batches)
    if isinstance(case.model, HSTUConfig):
        for policy in policies:
            name = f"ours, {policy}"
            calls[name], peaks[name] = our_step(case, batches, save=POLICIES[policy])
    for name in peers:
        try:
            calls[name] = torch_step(case, batches, checks, compiled=name == "torch.compile")
        except Exception as error:  # a peer that is missing or fails must not cost the run
            checks[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"skipped {name}: {checks[name]}")
    timings = time_interleaved(calls, repeats=repeats, flush_bytes=0)
    return {name: Measured(timing, peaks.get(name)) for name, timing in timings.items()}, checks


def figures(case: Case, measured: Measured) -> dict[str, float]:
    """Rates of a step at its median time."""
    counts = {"tokens": 0.0, "pairs": 0.0, "targets": 0.0}
    for batch in case.batches():
        lengths = np.diff(np.asarray(batch.seq_offsets)).astype(np.float64)
        counts["tokens"] += lengths.sum() / NUM_BATCHES
        counts["targets"] += lengths.sum() / NUM_BATCHES
        counts["pairs"] += (lengths * (lengths + 1) / 2).sum() / NUM_BATCHES
    seconds = max(measured.timing.p50_us / 1e6, 1e-12)
    flops = training_flops(case.model, case.loss, case.model.num_items)
    assert flops is not None
    rate = flops.of(**counts) / seconds
    found = {"tokens/s": counts["tokens"] / seconds, "GFLOP/s": rate / 1e9}
    if (peak := peak_flops()) is not None:
        found["MFU %"] = 100 * rate / peak
    return found


def main() -> None:
    """Runs the benchmark from the command line."""
    options = _options()
    chosen = {name: cases()[name] for name in options.cases}
    if options.quick:
        chosen = {name: quick(case) for name, case in chosen.items()}
    rows, measurements, checks = [], [], {}
    for name, case in chosen.items():
        found, checks[name] = measure(
            case, options.repeats, policies=options.policies, peers=options.peers
        )
        for variant, measured in found.items():
            rates = figures(case, measured)
            measurements.append(
                record.time_measurement(name, variant, measured.timing)
                | rates
                | {"peak_bytes": measured.peak}
            )
            rows.append(
                {
                    "case": name,
                    "step": variant,
                    "ms": f"{measured.timing.p50_us / 1e3:.2f}",
                    "of ours": f"{measured.timing.p50_us / found['ours'].timing.p50_us:.2f}",
                    "peak MB": "-" if measured.peak is None else f"{measured.peak / 1e6:.1f}",
                }
                | {rate: f"{value:,.4g}" for rate, value in rates.items()}
            )
    report.print_table("Training steps, median", rows)
    if options.record or options.scratch:
        path = record.write(
            "bench_training",
            config={"cases": {name: asdict(case) for name, case in chosen.items()}},
            measurements=measurements,
            checks=checks,
            seeds=[SEED],
            scratch=options.scratch,
            folder=options.results,
        )
        print(f"wrote {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times whole training steps.")
    on_gpu = jax.default_backend() == "gpu"
    default = tuple(cases()) if on_gpu else ON_CPU
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=list(default))
    parser.add_argument("--policies", nargs="*", choices=list(POLICIES), default=["automatic"])
    peers = PEERS if on_gpu else PEERS[:1]
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(peers))
    parser.add_argument("--repeats", type=int, default=20, help="samples of each variant")
    parser.add_argument("--quick", action="store_true", help="shrinks every case")
    parser.add_argument("--record", action="store_true", help="keeps the result")
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
