"""One of several processes that add up numbers until something happens to one of them.

python launch_worker.py <port> <of how many> <number> <what happens> <to which>
"""

import os
import signal
import sys
import time

import jax
import numpy as np

from jaxrec.distributed import EXIT_PREEMPTED, LaunchConfig, launch
from jaxrec.sharding import make_mesh, replicated, sharded_rows

HEARTBEAT = 3.0


def main(port: int, count: int, number: int, event: str, victim: int) -> None:
    config = LaunchConfig(
        f"localhost:{port}", count, number, start_timeout=60, heartbeat_timeout=HEARTBEAT,
        exit_timeout=30,
    )  # fmt: skip
    with launch(config) as launched:
        mesh = make_mesh({"data": jax.device_count()})
        own = np.full(1, number + 1, np.float32)
        ones = jax.make_array_from_process_local_data(sharded_rows(mesh, "data"), own)
        total = jax.jit(lambda x: x.sum(), out_shardings=replicated(mesh))
        for step in range(4):
            print("sum", float(total(ones)), flush=True)
            if step == 2 and number == victim:
                happen(event, launched)
        if event == "barrier":
            launched.barrier("met", timeout=30)
            sys.exit(EXIT_PREEMPTED)


def happen(event: str, launched) -> None:
    print("now", launched.peers[0].pid, flush=True)
    if event == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "hang":  # stopped by the test
        time.sleep(HEARTBEAT)
    if event == "raise":
        raise ValueError("broken")
    if event == "barrier":
        try:
            launched.barrier("alone", timeout=0.2)
        except TimeoutError as error:
            print(error, flush=True)


if __name__ == "__main__":
    port, count, number, event, victim = sys.argv[1:]
    main(int(port), int(count), int(number), event, int(victim))
