"""A step of several processes on sequences of skewed lengths: as read, balanced, and predicted.

    python -m experiments.balance_speedup

Each process is a rank with one device. Its samples, read or exchanged by `BalancedBatches` over
the mesh, go through an HSTU one by one, without padding: the loss and its gradient. The cost of a
sample by its length is calibrated on other batches: by one process for the balancer, then by all in
their turns for the prediction, which is measured as the steps are.

A step takes as long as its slowest rank. The ranks of this experiment may have to share a core, so
that the clock would show the sum of their work: they compute in turns, the others asleep, and what
counts is processor time of one thread, the least of some repetitions. Exchanges are not in it.

One JSON file goes to experiments/results/balance_speedup/.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import record, report
from jaxrec.data import SequenceDataset, training_batches
from jaxrec.distributed import BalanceConfig, BalancedBatches, OverMesh, balance
from jaxrec.distributed.sample_buffer import Samples, pack, unpack
from jaxrec.functional import split_params
from jaxrec.nn import HSTU, HSTUConfig
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.ops.losses import sampled_softmax_loss
from jaxrec.sharding import make_mesh

NUM_ITEMS, NEGATIVES = 2_000, 64
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
TIMEOUT_S = 1_500


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      processes: ranks.
      samples: that a rank reads for a step.
      steps: global batches.
      repeats: of each measurement; the least processor time counts.
      lengths, skew: a sample has one of these lengths, with a probability ∝ length ** -skew.
      width, num_blocks: of the HSTU.
      calibration: batches that costs are fitted to, in pairs of (samples, tokens of each).
    """

    processes: int = 4
    samples: int = 16
    steps: int = 6
    repeats: int = 8
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    skew: float = 0.9
    width: int = 64
    num_blocks: int = 2
    calibration: tuple[tuple[tuple[int, int], ...], ...] = (
        ((8, 32), (4, 64), (2, 128)), ((4, 64), (2, 256), (1, 512)), ((6, 32), (1, 1024)),
        ((2, 128), (2, 256), (1, 1024)), ((12, 32), (6, 64)), ((2, 64), (1, 512), (1, 1024)),
        ((3, 256), (2, 512)), ((8, 128), (2, 32)), ((2, 32), (2, 1024)), ((9, 64), (3, 128)),
    )  # fmt: skip


def main() -> None:
    """Runs the experiment, or one of its processes, from the command line."""
    parser = argparse.ArgumentParser(description="Balanced and unbalanced steps of processes.")
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    parser.add_argument("--process", nargs=3, metavar=("NUMBER", "PORT", "FOLDER"),
                        help="be one of the processes; used by the experiment itself")  # fmt: skip
    options = parser.parse_args()
    if options.process is None:
        run(Settings(), scratch=options.scratch)
        return
    number, port, folder = options.process
    be_process(int(number), int(port), Path(folder))


def run(settings: Settings, *, scratch: bool = False, folder: Path = record.RESULTS) -> dict:
    """Starts the processes, compares their times with the prediction, records; returns checks."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch_folder:
        shared = Path(scratch_folder)
        record.write_json(shared / "settings.json", asdict(settings))
        start_processes(settings.processes, shared)
        ranks = [record.read_json(shared / f"{n}.json") for n in range(settings.processes)]
    cost = pooled_cost(settings, ranks)
    rows, checks = compare(settings, ranks, cost)
    report.print_table("the slowest rank of a step", rows)
    print(
        f"speed-up by balance: {checks['speed_up']:.2f} measured, "
        f"{checks['predicted_speed_up']:.2f} predicted\n{cost}"
    )
    path = record.write(
        "balance_speedup",
        config=settings,
        measurements=[
            {"metric": "step", "unit": "ms", "value": row["measured, ms"], **row} for row in rows
        ],
        checks=checks | {"costs": vars(cost)},
        wall_s=time.perf_counter() - began,
        scratch=scratch,
        folder=folder,
    )
    print(f"wrote {path}")
    return checks


def pooled_cost(settings: Settings, ranks: list[dict]) -> balance.CostModel:
    """Fitted to what all ranks took for calibration batches in their turns."""
    lengths = [some_samples(groups).lengths for groups in settings.calibration]
    seconds = np.concatenate([rank["calibration"]["seconds"] for rank in ranks])
    return balance.fit(lengths * len(ranks), seconds).model


def compare(
    settings: Settings, ranks: list[dict], cost: balance.CostModel
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for the mean step as read and balanced, and how far the prediction is off."""
    rows = []
    for kind in ("as read", "balanced"):
        measured = np.array([rank[kind]["seconds"] for rank in ranks])
        predicted = np.array(
            [[cost.step_seconds(np.array(n)) for n in rank[kind]["lengths"]] for rank in ranks]
        )
        slowest, foreseen = measured.max(0).mean(), predicted.max(0).mean()
        rows.append(
            {
                "samples": kind,
                "measured, ms": 1e3 * float(slowest),
                "predicted, ms": 1e3 * float(foreseen),
                "prediction off by": f"{foreseen / slowest - 1:+.1%}",
                "slowest / mean rank": float((measured.max(0) / measured.mean(0)).mean()),
            }
        )
    totals = [[sum(rank[kind]["losses"][n] for rank in ranks) for kind in ("as read", "balanced")]
              for n in range(settings.steps)]  # fmt: skip
    read, balanced = rows
    checks = {
        "speed_up": read["measured, ms"] / balanced["measured, ms"],
        "predicted_speed_up": read["predicted, ms"] / balanced["predicted, ms"],
        "prediction_error": max(
            abs(row["predicted, ms"] / row["measured, ms"] - 1) for row in rows
        ),
        "loss_difference": max(abs(b / a - 1) for a, b in totals),
    }
    return rows, checks


def start_processes(count: int, folder: Path) -> None:
    """Runs all processes to their end.

    Raises:
      RuntimeError: one of them failed, with the end of what it printed.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_THREAD}
    command = [sys.executable, "-m", "experiments.balance_speedup", "--process"]
    processes: list[subprocess.Popen[str]] = []
    try:
        for number in range(count):
            arguments = [*command, str(number), str(port), str(folder)]
            process = subprocess.Popen(
                arguments, env=environment, cwd=report.ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            processes.append(process)
        for number, process in enumerate(processes):
            printed, _ = process.communicate(timeout=TIMEOUT_S)
            if process.returncode:
                raise RuntimeError(f"process {number} failed:\n{printed[-2_000:]}")
    finally:
        for process in processes:
            process.kill()


def be_process(number: int, port: int, folder: Path) -> None:
    """One rank: calibrates if it is the first, then measures its part of every step."""
    settings = Settings(**json.loads((folder / "settings.json").read_text()))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", settings.processes, number)
    transport = OverMesh(make_mesh({"data": settings.processes}), "data")
    compute = make_compute(settings)

    turns = Turns(folder, number, settings.processes)
    turns.take(lambda: compute(some_samples([(1, length) for length in settings.lengths])))
    known = [some_samples(groups) for groups in settings.calibration]
    if number == 0:
        seconds, _ = fastest(settings, compute, known)
        balance.fit([own.lengths for own in known], seconds).model.save(folder / "costs.json")
    turns.take(lambda: None)
    config = BalanceConfig(
        cost=balance.CostModel.load(folder / "costs.json"),
        max_sequences=settings.samples * settings.processes,
    )
    balanced = BalancedBatches([source(settings, number)], transport, config)
    work = {
        "calibration": known,
        "as read": [unpack(batch) for batch in source(settings, number)],
        "balanced": [unpack(jax.tree.map(lambda x: x[0], batch)) for batch in balanced],
    }
    # All kinds in each repetition: what else the machine does must not fall on one of them.
    seconds, losses = fastest(settings, compute, [own for of in work.values() for own in of], turns)
    found, at = {}, 0
    for kind, batches in work.items():
        part = slice(at, at + len(batches))
        found[kind] = {
            "lengths": [own.lengths.tolist() for own in batches],
            "seconds": seconds[part].tolist(),
            "losses": losses[part],
        }
        at += len(batches)
    record.write_json(folder / f"{number}.json", found)
    jax.distributed.shutdown()


class Turns:
    """Processes work one after the other; the others sleep, as no collective lets them."""

    def __init__(self, folder: Path, number: int, count: int):
        self._folder, self._number, self._count, self._round = folder, number, count, 0

    def take[T](self, work: Callable[[], T]) -> T:
        """The result of the work, when all processes have done theirs."""
        if self._number:
            self._wait_for(self._number - 1)
        found = work()
        self._done(self._number).touch()
        self._wait_for(self._count - 1)
        self._round += 1
        return found

    def _done(self, number: int) -> Path:
        return self._folder / f"{self._round}-{number}.done"

    def _wait_for(self, number: int) -> None:
        until = time.monotonic() + TIMEOUT_S
        while not self._done(number).exists():
            if time.monotonic() > until:
                raise TimeoutError(f"process {number} did not end turn {self._round}")
            time.sleep(0.01)


def source(settings: Settings, rank: int) -> Any:
    """What a rank reads: random items, sequences of skewed lengths."""
    rng = np.random.default_rng(rank)
    lengths = np.array(settings.lengths)
    share = lengths**-settings.skew / (lengths**-settings.skew).sum()
    drawn = rng.choice(lengths, settings.samples * settings.steps, p=share)
    sequences = [rng.integers(1, NUM_ITEMS + 1, length + 1).tolist() for length in drawn]
    batches = training_batches(
        SequenceDataset.from_sequences(sequences, num_items=NUM_ITEMS), mode="sequences",
        max_len=max(settings.lengths), token_budget=settings.samples * max(settings.lengths),
        max_sequences=settings.samples, seed=0, shuffle=False, num_epochs=1,
    )  # fmt: skip
    return iter(batches)


def make_compute(settings: Settings) -> Callable[[Samples], float]:
    """What a rank does in a step: the summed gradient of its samples; gives the summed loss."""
    negatives = jax.numpy.asarray(np.random.default_rng(0).integers(1, NUM_ITEMS + 1, NEGATIVES))
    gradients = {}
    for length in settings.lengths:  # max_len bounds what attention looks at
        config = HSTUConfig(
            NUM_ITEMS, length, width=settings.width, num_blocks=settings.num_blocks, dropout=0.0
        )
        gradients[length] = _gradient(config, negatives)

    def compute(samples: Samples) -> float:
        total = 0.0
        for number, length in enumerate(samples.lengths.tolist()):
            step, params = gradients[length]
            own = pack(
                samples.take(np.array([number])), token_budget=length, max_sequences=1,
                max_targets=length,
            )  # fmt: skip
            loss, _ = jax.block_until_ready(step(params, own))
            total += length * float(loss)
        return total

    return compute


def _gradient(config: HSTUConfig, negatives: jax.Array) -> tuple[Any, Any]:
    """The jitted loss and gradient of one sample of max_len tokens, and the weights."""
    rebuild, params = split_params(HSTU(config, rngs=nnx.Rngs(0)))

    def loss(params: Any, batch: JaggedBatch) -> jax.Array:
        model: Any = rebuild(params)
        hidden = model.encode(batch)[batch.target_positions]
        targets = jax.numpy.asarray(batch.target_ids)
        return sampled_softmax_loss(hidden, model.item_embeddings(), targets, negatives)

    return jax.jit(jax.value_and_grad(loss)), params


def fastest(
    settings: Settings,
    compute: Callable[[Samples], float],
    batches: Sequence[Samples],
    turns: Turns | None = None,
) -> tuple[np.ndarray, list[float]]:
    """The least processor seconds of each batch's compute, and its loss.

    Repetitions go through all batches, so that those of one batch lie far apart.
    """

    def once() -> list[tuple[float, float]]:
        found = []
        for samples in batches:
            began = time.process_time()
            loss = compute(samples)
            found.append((time.process_time() - began, loss))
        return found

    rounds = np.array([turns.take(once) if turns else once() for _ in range(settings.repeats)])
    return rounds[..., 0].min(axis=0), rounds[0, :, 1].tolist()


def some_samples(groups: Any) -> Samples:
    """Random samples, so many of each length, mixed."""
    rng = np.random.default_rng(1)
    lengths = np.concatenate([np.full(count, length, np.int64) for count, length in groups])
    rng.shuffle(lengths)
    return Samples(lengths, rng.integers(1, NUM_ITEMS + 1, (lengths.sum(), 3)).astype(np.int32))


if __name__ == "__main__":
    main()
