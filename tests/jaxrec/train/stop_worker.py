"""One of two processes that train together, of which only the second is told to stop.

python stop_worker.py <port> <number> <folder>
"""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from parallel_case import make_model, run_train

from jaxrec.distributed import EXIT_PREEMPTED, LaunchConfig, launch


def scores(state):
    return {"ndcg@10": 0.0}


def main(port, number, folder):
    jax.config.update("jax_num_cpu_devices", 2)
    config = LaunchConfig(f"localhost:{port}", 2, number, heartbeat_timeout=20, exit_timeout=60)

    def signal_the_second(state):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return scores(state)

    with launch(config):
        model = make_model()
        whole = run_train(folder / "whole", model, devices=4, evaluate=scores)
        first = run_train(folder / "parts", model, devices=4, evaluate=signal_the_second)
        print("stopped", first.stopped_because, int(first.state.step), flush=True)
        rest = run_train(folder / "parts", model, devices=4, evaluate=scores)
        assert rest.stopped_because == whole.stopped_because == "done"
        assert int(first.state.step) < int(whole.state.step)
        for a, b in zip(*map(jax.tree.leaves, (whole.state, rest.state)), strict=True):
            np.testing.assert_array_equal(a, b)
        print("same bits", flush=True)
        sys.exit(EXIT_PREEMPTED)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
