"""Where the time of a training step goes: a trace for a profiler's viewer, and a table by phase.

    python -m experiments.profile_step ml1m-hstu
    python -m experiments.profile_step beauty-sasrec --steps 50 --folder runs/profile

Takes a published setting (`python -m experiments.train_sequence --list`), compiles its step, and
runs some batches of its data. `<folder>/trace` opens in XProf or TensorBoard. Times of the device's
operations are summed by the phase of the step that they belong to: on a CPU over all threads, so
that they may exceed the step's own time.
"""

import argparse
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from experiments import report
from experiments.settings import find, names
from experiments.settings.base import build_model, load_split
from jaxrec.data import Split, training_batches
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.train import (
    TrainConfig,
    init_state,
    make_optimizer,
    make_schedule,
    make_step,
    training_flops,
    use_compile_cache,
)
from jaxrec.train.utilisation import speed_figures

PHASES = ("encode", "loss", "overarch", "draw", "update")
WARM_UP = 2


def phase_of(op_name: str) -> str:
    """The phase of an operation, from the scopes that it was traced under."""
    for phase in PHASES:
        if re.search(rf"\b{phase}\b", op_name):
            return f"{phase}, gradient" if "transpose(" in op_name else phase
    return "other"


def phases_of_program(hlo_text: str | None) -> dict[str, str]:
    """Of every instruction that says where it comes from."""
    named = re.findall(
        r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', hlo_text or "", re.MULTILINE
    )
    return {name: phase_of(op_name) for name, op_name in named}


def own_times(events: Iterator[Any]) -> Counter[str]:
    """Nanoseconds of each instruction on one thread or stream, without those it contains."""
    times: Counter[str] = Counter()
    open_events: list[tuple[float, str]] = []
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        name = dict(event.stats).get("hlo_op")
        if name is None:
            continue
        while open_events and open_events[-1][0] <= event.start_ns:
            open_events.pop()
        if open_events:
            times[open_events[-1][1]] -= event.duration_ns
        times[name] += event.duration_ns
        open_events.append((event.start_ns + event.duration_ns, name))
    return times


def device_times(trace: Path) -> Counter[str]:
    """Nanoseconds of each instruction of the newest trace in a folder, over all threads."""
    files = sorted(trace.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    times: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the reader's own types
        for plane in ProfileData.from_file(str(files[-1])).planes:
            for line in plane.lines:
                times.update(own_times(iter(line.events)))
    return times


def by_phase(times: Counter[str], phases: dict[str, str], steps: int) -> list[dict[str, Any]]:
    """A row each, the longest first."""
    sums: Counter[str] = Counter()
    for name, nanoseconds in times.items():
        sums[phases.get(name, "other")] += nanoseconds
    total = max(sum(sums.values()), 1)
    return [
        {
            "phase": phase,
            "ms a step": f"{nanoseconds / steps / 1e6:.3f}",
            "share": f"{100 * nanoseconds / total:.1f} %",
        }
        for phase, nanoseconds in sums.most_common()
    ]


def main() -> None:
    """Runs the steps, writes the trace and prints the tables."""
    options = _options()
    use_compile_cache(options.folder / "compiled")
    setting = find(options.setting)
    _, split = loaded = load_split(options.data or setting.data, min_count=setting.min_count)
    model, training = build_model(setting, *loaded, seed=0), setting.train
    optimizer = make_optimizer(training.optimizer)
    state = init_state(model, optimizer, seed=0, ema_decay=training.ema_decay)
    step = make_step(
        model,
        optimizer,
        loss=training.loss,
        schedule=make_schedule(training.optimizer),
        ema_decay=training.ema_decay,
    )
    host, seconds = _timed(lambda: _batches(split, model, training, WARM_UP + options.steps))
    times = {"making a batch, in a thread": seconds / len(host)}
    placed, seconds = _timed(lambda: jax.block_until_ready(jax.device_put(host)))
    times["copying it to the device, in that thread"] = seconds / len(host)
    program, times["compiling, once"] = _timed(lambda: step.lower(state, placed[0]).compile())
    for batch in placed[:WARM_UP]:
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    results = []
    trace = options.folder / "trace"
    tracing = jax.profiler.ProfileOptions()
    tracing.python_tracer_level = 0  # every call of every function would be an event
    with jax.profiler.trace(str(trace), profiler_options=tracing):
        started = time.perf_counter()
        for batch in placed[WARM_UP:]:
            state, metrics = step(state, batch)
            results.append(metrics)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - started
    times["a step"] = seconds / options.steps
    rows = by_phase(device_times(trace), phases_of_program(program.as_text()), options.steps)
    report.print_table(f"{options.setting}: operations of the device by phase", rows)
    host_rows = [{"on the host": name, "ms": f"{1e3 * t:.2f}"} for name, t in times.items()]
    report.print_table("Beside it", host_rows)
    results = jax.device_get(results)
    counts = {
        name: float(sum(getattr(metrics, f"num_{name}") for metrics in results))
        for name in ("tokens", "pairs", "targets")
    }
    flops = training_flops(model.config, training.loss, split.train.num_items)
    speed = speed_figures(seconds, **counts, flops=flops)
    print("  ".join(f"{name} {value:,.4g}" for name, value in speed.items()))
    print(f"trace in {trace}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Profiles a training step.")
    parser.add_argument("setting", choices=names(), help="a published setting")
    parser.add_argument("--data", type=Path, help="the dataset, if not where the setting has it")
    parser.add_argument("--steps", type=int, default=10, help="traced, after two that are not")
    parser.add_argument("--folder", type=Path, default=Path("runs/profile"))
    return parser.parse_args()


def _timed[T](work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _batches(split: Split, model: Any, training: TrainConfig, count: int) -> list[JaggedBatch]:
    batches = training_batches(
        split.train,
        mode=training.sampling,
        max_len=model.config.max_len,
        token_budget=training.token_budget,
        max_sequences=training.max_sequences,
        seed=0,
    )
    return list(islice(iter(batches), count))


if __name__ == "__main__":
    main()
