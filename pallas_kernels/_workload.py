"""What a workload is: one named problem size, shared by tests, benchmarks, tuning and compiles."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np


class Workload(Protocol):
    """A problem size of one op. Each op folder keeps its own in `workloads.py`, as `WORKLOADS`."""

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the arguments; needs no memory."""
        ...

    def arrays(self, seed: int) -> tuple[np.ndarray, ...]:
        """Realistic arguments of those shapes; the same for the same seed."""
        ...

    def run(self, *arrays: Any, backend: Any = None, config: Any = None) -> Any:
        """Calls the op with this workload's static arguments."""
        ...

    def floor_bytes(self) -> int:
        """Bytes that any implementation must move to and from device memory."""
        ...


type Workloads = Mapping[str, Workload]
