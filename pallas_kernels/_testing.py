"""Help for the tests of kernels: tolerances, and Mosaic GPU's simulator in a process of its own.

A kernel that waits for an arrival that never comes hangs the simulator, so each simulation runs in
a subprocess with a time limit.
"""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

TOLERANCES = {
    "float64": (1e-12, 1e-12),
    "float32": (2e-5, 2e-5),
    "float16": (2e-3, 2e-3),
    "bfloat16": (2e-2, 2e-2),
}
"""(relative, absolute) error allowed by the narrowest dtype that a computation goes through."""


# Simulated warpgroups wait for each other, and compile, inside of callbacks that hold threads of
# the runtime. It has one a core, so that on few cores none would be left to go on.
_THREADS = "32"
# Most of a simulation's time is compiling.
_COMPILE_FLAGS = (
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)


class SimulationError(AssertionError):
    """A simulated kernel raced, hung or raised."""


def assert_close(actual: Any, expected: Any, *, dtype: Any = None) -> None:
    """Asserts equality within the tolerance of `dtype` (of `actual`, if None); integers exactly."""
    name = np.dtype(actual.dtype if dtype is None else dtype).name
    if name not in TOLERANCES:
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))
        return
    rtol, atol = TOLERANCES[name]
    wide = [np.asarray(values).astype(np.float64) for values in (actual, expected)]
    np.testing.assert_allclose(*wide, rtol=rtol, atol=atol)


def simulate(
    target: str, cases: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], *, timeout_s: int = 120
) -> list[Any]:
    """Runs a function's Mosaic GPU kernels in the simulator, with race detection.

    Args:
      target: "module:function", importable in a fresh process with this one's import path.
      cases: (positional, keyword) arguments of each call; arrays and other picklable values.
      timeout_s: limit on all calls together; a start costs about four seconds of it.

    Returns:
      What each call returned, with NumPy arrays for JAX's.

    Raises:
      SimulationError: a data race, a hang, or an exception, with the simulator's own words.

    The simulator does not see everything: `wgmma` is synchronous there, so a missing
    `wgmma_wait` passes, as do reductions across warps, for which Mosaic gives the same scratch to
    all warpgroups; and operations run that no GPU compile accepts.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PJRT_NPROC": _THREADS,
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *_COMPILE_FLAGS]).strip(),
    }
    with tempfile.TemporaryDirectory(prefix="simulate_") as folder:
        asked, answered = Path(folder) / "asked", Path(folder) / "answered"
        asked.write_bytes(pickle.dumps((target, cases)))
        command = [sys.executable, "-m", "pallas_kernels._testing", str(asked), str(answered)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            raise SimulationError(
                f"{target} did not finish in {timeout_s} s; look for a barrier that is waited for "
                "more often than it is arrived at"
            ) from None
        if done.returncode:
            raise SimulationError(f"{target} failed in the simulator:\n{done.stderr[-4000:]}")
        results, raced = pickle.loads(answered.read_bytes())
    if any(raced):
        raise SimulationError(
            f"{target} has a data race in case {raced.index(True)}:\n{done.stdout}"
        )
    return results


def _answer(asked: Path, answered: Path) -> None:
    """The subprocess's side of `simulate`."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulator
    from jax.experimental.pallas import mosaic_gpu as plgpu

    target, cases = pickle.loads(asked.read_bytes())
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    results, raced = [], []
    for args, kwargs in cases:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            output = jax.block_until_ready(function(*args, **kwargs))
        results.append(jax.tree.map(np.asarray, output))
        raced.append(bool(simulator.get_races().races_found))
    answered.write_bytes(pickle.dumps((results, raced)))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]), Path(sys.argv[2]))
