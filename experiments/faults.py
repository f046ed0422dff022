"""Breaks a small training job in every way it may break; it must end with the same bits.

    python -m experiments.faults                       # 20 kills, and one of every other fault
    python -m experiments.faults --kills 5 --processes 4

A job of several processes on CPU devices trains HSTU on a synthetic catalogue, item rows split over
the devices and samples balanced. Each fault meets a job at a random place; the
job must end with a named reason within the time-out, and, started again, with the weights of a job
that nothing happened to.
"""

import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

from experiments import readme, record, report
from jaxrec.data import SyntheticConfig, leave_one_out, synthetic_catalogue
from jaxrec.distributed import EXIT_PEER_LOST, EXIT_PREEMPTED, BalanceConfig, LaunchConfig, launch
from jaxrec.nn import HSTU, HSTUConfig
from jaxrec.sharding import make_mesh
from jaxrec.train import (
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    train,
    use_compile_cache,
)

NOBODY = -1
START_S = 300  # in which a job has come as far as it is to go
FURTHEST = 10  # steps that a job may take before a fault, and some
OTHER_DEVICES_ERROR = 1e-4  # sums over devices are rounded in another order
RECORDED = ("kills", "processes", "devices", "heartbeat", "epochs", "seed")


@dataclass(frozen=True)
class Faults:
    """What to break.

    Attributes:
      kills: times that a process is killed at random.
      others: whether each of the other faults happens, too.
      processes: of the job.
      devices: of a process.
      epochs: of a job, of 16 steps.
      heartbeat: seconds of silence after which a process counts as lost.
      seed: of victims and moments.
      folder: of the jobs; emptied first.
      scratch: records the result of a source tree with uncommitted changes, marked as such.
      worker: this program is process number so of a job; used by itself.
      coordinator: of the job.
    """

    kills: int = 20
    others: bool = True
    processes: int = 2
    devices: int = 2
    epochs: int = 4
    heartbeat: float = 6.0
    seed: int = 0
    folder: Path = Path("runs/faults")
    results: Path = record.RESULTS
    scratch: bool = False
    worker: int = NOBODY
    coordinator: str = ""


# The job.


def work(config: Faults) -> None:
    """One process of a job; the first leaves the final weights in the folder."""
    jax.config.update("jax_num_cpu_devices", config.devices)
    use_compile_cache(config.folder.parent / "compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    together = LaunchConfig(
        config.coordinator,
        config.processes,
        config.worker,
        start_timeout=120,
        heartbeat_timeout=config.heartbeat,
    )
    catalogue = SyntheticConfig(num_users=400, num_items=300, num_topics=8, max_events=24)
    with launch(together) as launched:
        split = leave_one_out(synthetic_catalogue(catalogue).interactions)
        shape = HSTUConfig(split.train.num_items, max_len=24, width=16, num_blocks=1, dropout=0.0)
        parallel = ParallelConfig(num_sources=4, balance=BalanceConfig(), virtual_shards=16)
        result = train(
            HSTU(shape, rngs=nnx.Rngs(0)),
            split,
            config=TrainConfig(
                token_budget=96,
                max_sequences=8,
                loss=LossConfig("sampled", num_negatives=32),
                optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=5, rows="adam"),
                num_epochs=config.epochs,
                eval_every=config.epochs,
                eval_users=64,
                checkpoint_every=2,
                patience=0,
            ),
            folder=config.folder,
            parallel=parallel,
            mesh=make_mesh({parallel.axis: jax.device_count()}),
        )
        if result.stopped_because.startswith("SIG"):
            sys.exit(EXIT_PREEMPTED)
        if launched.is_first:
            leaves = {str(n): leaf for n, leaf in enumerate(jax.tree.leaves(result.state))}
            np.savez(config.folder / "final.npz", **leaves)


class Job:
    """The processes of a job, started; what they print goes to files of the folder."""

    def __init__(self, config: Faults, folder: Path, *, processes: int = 0, devices: int = 0):
        self.folder, self.config = folder, config
        count = processes or config.processes
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        options: dict[str, Any] = {
            "folder": folder,
            "processes": count,
            "devices": devices or config.devices,
            "heartbeat": config.heartbeat,
            "epochs": config.epochs,
            "coordinator": address,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.printed = [folder.with_name(f"{folder.name}-{n}.txt") for n in range(count)]
        self.processes: list[subprocess.Popen] = []
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        for number, path in enumerate(self.printed):
            call = [sys.executable, "-m", "experiments.faults", "--worker", str(number), *words]
            with path.open("w") as file:
                self.processes.append(
                    subprocess.Popen(call, stdout=file, stderr=subprocess.STDOUT, env=environment)
                )

    def text(self, number: int) -> str:
        """What a process has printed."""
        return self.printed[number].read_text(errors="replace")

    def wait_for_step(self, step: int) -> None:
        """Returns when the job has begun to save a step, or one behind it."""
        end = time.monotonic() + START_S
        while newest_step(self.folder) < step:
            if time.monotonic() > end or all(p.poll() is not None for p in self.processes):
                raise RuntimeError(f"no step {step}:\n" + self.text(0)[-3000:])
            time.sleep(0.02)

    def codes(self, timeout: float = START_S, *, but: Sequence[int] = ()) -> list[int]:
        """Exit codes of all processes but some, once they have ended."""
        end = time.monotonic() + timeout
        own = [p for number, p in enumerate(self.processes) if number not in but]
        return [process.wait(max(0.1, end - time.monotonic())) for process in own]

    def kill(self) -> None:
        """Ends whatever still runs."""
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def running(config: Faults, folder: Path, **sizes: int) -> Iterator[Job]:
    """A job that does not outlive the block."""
    job = Job(config, folder, **sizes)
    try:
        yield job
    finally:
        job.kill()


def newest_step(folder: Path) -> int:
    """The last step of which a part is written; 0 for none."""
    parts = folder / "parts"
    names = [path.name for path in parts.iterdir()] if parts.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


# The faults. Each happens to a folder, and gives what was seen; the driver then finishes the job.


def kill(config: Faults, folder: Path, chance: random.Random, victim: int = NOBODY) -> dict:
    """A process gets SIGKILL; the others must name it."""
    with running(config, folder) as job:
        reach_somewhere(job, chance)
        victim = chance.randrange(config.processes) if victim == NOBODY else victim
        started = time.monotonic()
        job.processes[victim].kill()
        return named_end(job, victim, started)


def lost_coordinator(config: Faults, folder: Path, chance: random.Random) -> dict:
    """Process 0, which the others meet at, gets SIGKILL."""
    return kill(config, folder, chance, victim=0)


def short_stop(config: Faults, folder: Path, chance: random.Random) -> dict:
    """A process stands still for half the time-out; the job must go on by itself."""
    with running(config, folder) as job:
        reach_somewhere(job, chance)
        victim = job.processes[chance.randrange(config.processes)]
        victim.send_signal(signal.SIGSTOP)
        time.sleep(config.heartbeat / 2)
        victim.send_signal(signal.SIGCONT)
        codes = job.codes()
    expect(codes == [0] * config.processes, f"exit codes {codes} after a short stop", job)
    return {}


def long_stop(config: Faults, folder: Path, chance: random.Random) -> dict:
    """A process stands still until the others have given it up; then it wakes."""
    with running(config, folder) as job:
        reach_somewhere(job, chance)
        victim = chance.randrange(config.processes)
        started = time.monotonic()
        job.processes[victim].send_signal(signal.SIGSTOP)
        seen = named_end(job, victim, started)
        job.processes[victim].send_signal(signal.SIGCONT)
        code = job.processes[victim].wait(60)
        expect(code == EXIT_PEER_LOST, f"the woken process ended with {code}", job)
        return seen


def full_disk(config: Faults, folder: Path, chance: random.Random) -> dict:
    """One process may write no file above 512 bytes for a while (RLIMIT_FSIZE)."""
    with running(config, folder) as job:
        reach_somewhere(job, chance)
        victim = job.processes[-1].pid
        unlimited = resource.prlimit(victim, resource.RLIMIT_FSIZE)
        resource.prlimit(victim, resource.RLIMIT_FSIZE, (512, unlimited[1]))
        failed = re.compile(r"could not be written.*: process \d+: OSError.*large")
        end = time.monotonic() + START_S
        while not failed.search(job.text(0)):
            expect(time.monotonic() < end, "no failed save was reported", job)
            time.sleep(0.05)
        resource.prlimit(victim, resource.RLIMIT_FSIZE, unlimited)
        codes = job.codes()
    expect(codes == [0] * config.processes, f"exit codes {codes} after a full disk", job)
    return {}


def corrupt_shard(config: Faults, folder: Path, chance: random.Random) -> dict:
    """The job is stopped; a byte of the newest checkpoint's last part is altered."""
    preempt(config, folder, chance)
    newest = max(int(path.name) for path in (folder / "checkpoints").iterdir())
    files = (folder / "parts" / str(newest) / str(config.processes - 1)).glob("*.npy")
    file = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 0xFF
    file.write_bytes(data)
    return {"must print": f"the checkpoint of step {newest} is damaged"}


def preempt(config: Faults, folder: Path, chance: random.Random) -> dict:
    """One process gets SIGTERM; all must save after the same step and end with their code."""
    with running(config, folder) as job:
        reach_somewhere(job, chance)
        started = time.monotonic()
        job.processes[chance.randrange(config.processes)].terminate()
        codes = job.codes()
        seconds = time.monotonic() - started
    expect(codes == [EXIT_PREEMPTED] * config.processes, f"exit codes {codes}", job)
    return {"seconds": seconds}


def elastic(config: Faults, folder: Path, chance: random.Random) -> dict:
    """Stopped, and finished by one process that has all the devices."""
    preempt(config, folder, chance)
    return {"processes": 1, "devices": config.devices * config.processes}


def fewer_devices(config: Faults, folder: Path, chance: random.Random) -> dict:
    """Stopped, and finished by one process with its own devices alone."""
    preempt(config, folder, chance)
    return {"processes": 1, "devices": config.devices}


OTHERS: tuple[Callable[..., dict], ...] = (
    lost_coordinator,
    short_stop,
    long_stop,
    full_disk,
    preempt,
    corrupt_shard,
    elastic,
    fewer_devices,
)


def reach_somewhere(job: Job, chance: random.Random) -> None:
    """Lets the job come a random number of saves further, and to a random place between two."""
    job.wait_for_step(newest_step(job.folder) + 2 * chance.randrange(1, 4))
    time.sleep(chance.random() * 0.3)


def named_end(job: Job, victim: int, started: float) -> dict:
    """The other processes' end: in time, with their code and the victim's name."""
    codes = job.codes(60, but=[victim])
    seconds = time.monotonic() - started
    expect(set(codes) == {EXIT_PEER_LOST}, f"the others ended with {codes}", job)
    pid = job.processes[victim].pid
    for number in set(range(len(job.processes))) - {victim}:
        named = f"process {victim} ({socket.gethostname()}, pid {pid})"
        expect(named in job.text(number), f"process {number} does not name {named}", job)
    return {"seconds": seconds}


def expect(true: bool, what: str, job: Job) -> None:
    """Fails with what the processes printed."""
    if not true:
        texts = [f"--- process {n}\n{job.text(n)[-3000:]}" for n in range(len(job.processes))]
        raise RuntimeError("\n".join([what, *texts]))


# The driver.


def finish(config: Faults, folder: Path, seen: dict) -> Path:
    """Starts a job again where it was stopped, to its end; gives its weights."""
    final, checkpoints = folder / "final.npz", folder / "checkpoints"
    saved = checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir())
    sizes = {name: seen[name] for name in ("processes", "devices") if name in seen}
    if not final.exists():
        with running(config, folder, **sizes) as job:
            codes = job.codes()
            expect(set(codes) == {0}, f"exit codes {codes} of a job started again", job)
            told = seen.get("must print", "resuming after step" if saved else "")
            expect(told in job.text(0), f"process 0 did not print {told!r}", job)
    return final


def difference(one: Path, other: Path) -> float:
    """Of all weights and moments the largest difference, as a part of the largest value."""
    with np.load(one) as a, np.load(other) as b:
        pairs = [(np.asarray(a[k], np.float64), np.asarray(b[k], np.float64)) for k in a.files]
    return max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)) for x, y in pairs)


def killed_jobs(
    config: Faults, whole: Path, chance: random.Random, shown: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Kills a job again and again, and the next one where it has come near its end."""
    last, folder, seconds = newest_step(whole.parent), config.folder / "kill-1", []
    for number in range(config.kills):
        shown(f"kill {number + 1}")
        if newest_step(folder) + FURTHEST > last:
            yield outcome("kill", seconds, difference(whole, finish(config, folder, {})))
            folder, seconds = config.folder / f"kill-{number + 1}", []
        seconds.append(kill(config, folder, chance)["seconds"])
    if seconds:
        yield outcome("kill", seconds, difference(whole, finish(config, folder, {})))


def outcome(fault: str, seconds: Sequence[float], error: float) -> dict[str, Any]:
    """What is recorded of a job.

    Raises:
      RuntimeError: its weights are not those of the undisturbed job.
    """
    moved = fault in (elastic.__name__, fewer_devices.__name__)
    allowed = OTHER_DEVICES_ERROR if moved else 0.0
    if error > allowed:
        raise RuntimeError(f"{fault}: the weights differ by {error:g}; allowed are {allowed:g}")
    return {
        "metric": "difference of the final weights",
        "unit": "1",
        "workload": fault,
        "value": error,
        "seconds until all had ended": [round(s, 2) for s in seconds],
    }


def main(config: Faults) -> None:
    """Breaks, finishes, compares, records."""
    if config.worker != NOBODY:
        work(config)
        return
    from rich.progress import Progress

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and its jobs with it
    chance, started = random.Random(config.seed), time.monotonic()
    shutil.rmtree(config.folder, ignore_errors=True)
    config.folder.mkdir(parents=True)
    others = OTHERS if config.others else ()
    with Progress() as bar:
        task = bar.add_task("undisturbed", total=config.kills + len(others) + 1)

        def shown(what: str) -> None:
            bar.update(task, advance=1, description=what)

        whole = finish(config, config.folder / "whole", {"must print": ""})
        rows = list(killed_jobs(config, whole, chance, shown))
        for fault in others:
            name = fault.__name__
            shown(name.replace("_", " "))
            seen = fault(config, config.folder / name, chance)
            error = difference(whole, finish(config, config.folder / name, seen))
            rows.append(outcome(name, [seen["seconds"]] if "seconds" in seen else [], error))
        shown("done")
    path = record.write(
        "faults",
        config={name: getattr(config, name) for name in RECORDED},
        measurements=rows,
        seeds=[config.seed],
        wall_s=time.monotonic() - started,
        scratch=config.scratch,
        folder=config.results,
    )
    report.print_table("Faults", readme.fault_rows(rows))
    print(f"recorded in {path}")


if __name__ == "__main__":
    main(tyro.cli(Faults))
