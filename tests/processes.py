"""Starts programs that run together, and never leaves one behind."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    code: int
    out: str
    errors: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def python(program: Path, *arguments: object) -> list[object]:
    return [sys.executable, program, *arguments]


@contextmanager
def started(calls: Sequence[Sequence[object]]) -> Iterator[list]:
    """One process for each call; all are killed at the end.

    XLA's CPU client needs more threads than cores where collectives wait for other processes.
    """
    more = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PJRT_NPROC": "32"}
    environment = os.environ | more
    processes = [
        subprocess.Popen(
            [*map(str, call)], env=environment, text=True, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for call in calls
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen, timeout: float = 120) -> Ended:
    out, errors = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, errors)
