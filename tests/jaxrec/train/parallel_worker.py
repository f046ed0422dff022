"""One of several processes that train together; writes its losses and final weights.

python parallel_worker.py <number> <of how many> <port of the first> <devices> <folder>
"""

import sys
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
from parallel_case import StoppedError, make_model, parallel_run, run_train, stops_at, train_steps

STEPS = 6


def main(number: int, count: int, port: int, devices: int, folder: Path) -> None:
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, number)
    model = make_model()
    losses, state = train_steps(parallel_run(model, devices=count * devices), STEPS)
    leaves = {str(n): leaf for n, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(folder / f"{number}.npz", losses=losses, **leaves)
    if devices > 1:
        with suppress(StoppedError):
            run_train(folder / "run", model, devices=count * devices, evaluate=stops_at(5))
    jax.distributed.shutdown()


if __name__ == "__main__":
    own, processes, first_port, own_devices = map(int, sys.argv[1:5])
    main(own, processes, first_port, own_devices, Path(sys.argv[5]))
