"""Writes measurements with all that is needed to repeat them.

One JSON file a run, `experiments/results/<experiment>/<utc>-<sha>.json`, never overwritten.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._timing import Timing

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write(
    experiment: str,
    *,
    config: Any,
    measurements: Sequence[Mapping[str, Any]],
    checks: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (),
    data: Mapping[str, Any] | None = None,
    published: Sequence[str] = (),
    wall_s: float | None = None,
    scratch: bool = False,
    folder: Path = RESULTS,
) -> Path:
    """Writes one result file and returns its path.

    Args:
      experiment: name of the experiment; one folder each.
      config: a dataclass or a mapping that JSON can hold.
      measurements: one mapping each, with at least `metric`, `unit` and `value` or `samples`.
      checks: errors against the reference and other proofs of correctness.
      data: name and sha256 of what was measured on; see `describe_data`.
      published: figures of others, as text with their source.
      scratch: allows a tree with uncommitted changes; the file is then marked `dirty`.

    Raises:
      RuntimeError: the source tree has uncommitted changes and `scratch` is False.
    """
    git = git_state()
    if git["dirty"] and not scratch:
        raise RuntimeError(
            "the source tree has uncommitted changes, so a result could not be repeated from its "
            "commit; commit first, or ask for a scratch result (--scratch)"
        )
    now = time.gmtime()
    result = {
        "schema_version": SCHEMA_VERSION,
        "experiment": experiment,
        "command": command_line(),
        "config": asdict(config) if is_dataclass(config) else config,  # pyright: ignore
        "git": git,
        "env": environment(),
        "data": data,
        "seeds": list(seeds),
        "published": list(published),
        "measurements": [dict(m) for m in measurements],
        "checks": dict(checks or {}),
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", now),
        "wall_s": wall_s,
    }
    path = folder / experiment / f"{time.strftime('%Y%m%dT%H%M%SZ', now)}-{git['sha'][:7]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    while path.exists():
        path = path.with_stem(path.stem + "x")
    write_json(path, result)
    return path


def time_measurement(workload: str, variant: str, timing: Timing) -> dict[str, Any]:
    """The entry of `measurements` for times of one variant."""
    return {
        "metric": "time",
        "unit": "us",
        "workload": workload,
        "backend": variant,
        "samples": list(timing.samples_us),
        "p20": timing.p20_us,
        "p50": timing.p50_us,
        "p80": timing.p80_us,
    }


def command_line() -> str:
    """The command as a reader would type it, without paths of this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"
    return " ".join([program, *sys.argv[1:]])


def git_state() -> dict[str, Any]:
    """Commit and whether tracked files differ from it; "unknown" outside a checkout."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"sha": _git("rev-parse", "HEAD") or "unknown", "dirty": bool(changed)}


def git_sources(folder: str) -> str | None:
    """A digest of the Python files in a folder of the repository, None if not as committed."""
    files = f":/{folder}/*.py"
    listed = _git("ls-files", "--stage", "--", files)
    changed = _git("status", "--porcelain", "--", files)
    return hashlib.sha256(listed.encode()).hexdigest()[:16] if listed and not changed else None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def environment() -> dict[str, Any]:
    """Versions and device of this process."""
    versions = {}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **versions,
        "platform": device.platform,
        "device_kind": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "device_count": jax.device_count(),
        "cpu_cores": _usable_cores(),
    }


def _usable_cores() -> int | None:
    """Cores this process may run on, which pinning makes fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_data(name: str, *paths: Path) -> dict[str, str]:
    """Name and joint sha256 of the files that were read."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return {"name": name, "sha256": digest.hexdigest()}


def read_all(experiment: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All results of an experiment, oldest first, each with its `path`."""
    paths = sorted((folder / experiment).glob("*.json"))
    return [read_json(path) | {"path": path} for path in paths]


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    scratch.replace(path)


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote."""
    return json.loads(path.read_text())


def largest_error(answer: Any, wanted: Any) -> float:
    """Over all results: the largest difference as a share of the largest value."""
    errors = []
    for a, b in zip(jax.tree.leaves(answer), jax.tree.leaves(wanted), strict=True):
        a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        errors.append(float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-20)))
    return max(errors) if all(map(np.isfinite, errors)) else float("nan")


def peak_bytes(analysis: Any) -> int:
    """Arguments, results and temporaries of a program, from its `memory_analysis`."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
    )
