"""Runs a program as one of several processes, from the first hello to the end of the last.

    with launch(LaunchConfig()) as launched:          # srun, mpirun, Kubernetes, variables
        mesh = make_mesh({"data": jax.device_count()})
        ...

Exit codes, for whatever starts the processes: 0 done; `EXIT_PREEMPTED` (75) stopped by a signal and
saved; `EXIT_PEER_LOST` (76) another process is lost, which the error names; 1 an error of its own.
After 75 and 76 the same command goes on from the last checkpoint.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Never

import jax
from jax._src import xla_bridge

from jaxrec.distributed.key_value import KeyValue
from jaxrec.distributed.launchers import LaunchConfig, LaunchError, find_place, split_address
from jaxrec.distributed.roll_call import Peer, await_service, roll_call
from jaxrec.distributed.watch import EXIT_PREEMPTED, Watch

CPU_THREADS = 32
POLL_S = 0.02
SLOWEST_POLL_S = 0.5
FAR_S = 10_000  # JAX's own time-outs, which would end processes without a name


class Launched(NamedTuple):
    """The processes of a job that have come together.

    Attributes:
      found: what told which process this is; see `find_place`.
      process_id: of this one.
      peers: all processes, by their numbers.
    """

    found: str
    process_id: int
    peers: list[Peer]

    @property
    def num_processes(self) -> int:
        """How many there are."""
        return len(self.peers)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and records."""
        return self.process_id == 0

    def barrier(self, name: str, *, timeout: float | int) -> None:
        """Waits until all processes have come to the barrier of this name, once for each name.

        Raises:
          TimeoutError: some have not after so many seconds; it names them.

        Cost: a few calls of about 1 ms to process 0; no device takes part.
        """
        if self.num_processes == 1:
            return
        store = KeyValue(f"barrier/{name}")
        store.set(str(self.process_id), "here")
        self._wait_for(lambda: set(map(int, store.all())), f"barrier {name!r}", timeout)

    def _wait_for(self, come: Callable[[], set[int]], what: str, timeout: float | int) -> None:
        end, pause = time.monotonic() + timeout, POLL_S
        while len(here := come()) < self.num_processes:
            if time.monotonic() > end:
                missing = [str(peer) for peer in self.peers if peer.process not in here]
                raise TimeoutError(
                    f"{what}: {', '.join(missing)} did not come within {timeout:g} s, though still "
                    "alive; look for what it waits for"
                )
            time.sleep(pause)
            pause = min(SLOWEST_POLL_S, 1.5 * pause)


@contextmanager
def launch(config: LaunchConfig | None = None) -> Iterator[Launched]:
    """Joins the other processes of the job, and watches them until the block ends.

    Put it around the whole program, before anything else of JAX. On a CPU collectives run over
    Gloo. If another process is lost or fails, this one ends with `EXIT_PEER_LOST` and an error that
    names it. An exception that leaves the block is printed and ends this process at once with
    exit code 1, and the others with it; `sys.exit` with 0 or `EXIT_PREEMPTED` is no failure, if all
    processes do it. A single process is joined to nobody, and exceptions pass as usual.

    Raises:
      LaunchError: see `find_place` and `roll_call`; or JAX has been used before.
    """
    config = config or LaunchConfig()
    place = find_place(config, os.environ)
    # XLA's CPU client compiles on the threads on which collectives wait for others. With no more
    # threads than cores all may be waiting for what none is left to compute or compile.
    os.environ.setdefault("PJRT_NPROC", str(CPU_THREADS))
    if place.num_processes == 1:
        yield Launched(place.found, 0, [Peer(0, "localhost", os.getpid())])
        return
    if xla_bridge.backends_are_initialized():
        raise LaunchError(
            "JAX has looked for its devices already, without the other processes; launch first"
        )
    peers, address = roll_call(place, config.start_timeout), split_address(place.coordinator)
    if place.process_id > 0:
        await_service(address)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # takes SIGTERM away from the loop
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=int(config.start_timeout) + 1,
        heartbeat_timeout_seconds=FAR_S,
        shutdown_timeout_seconds=int(config.exit_timeout) + 1,
    )
    watch = Watch(peers, place.process_id, address, config.heartbeat_timeout)
    watch.start()
    launched = Launched(place.found, place.process_id, peers)
    try:
        _check_devices(launched)
        yield launched
    except SystemExit as leaving:
        if leaving.code not in (None, 0, EXIT_PREEMPTED):
            _fail(watch, leaving)
        _leave(launched, watch, config.exit_timeout)
        raise
    except BaseException as error:
        _fail(watch, error)
    _leave(launched, watch, config.exit_timeout)


def _check_devices(launched: Launched) -> None:
    counts = dict.fromkeys(range(launched.num_processes), 0)
    for device in jax.devices():
        counts[device.process_index] += 1
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} on {launched.peers[n]}" for n, count in counts.items())
        raise LaunchError(
            f"the processes have different numbers of devices: {told}. Give each as many, with "
            "local_device_ids or the launcher's options"
        )


def _leave(launched: Launched, watch: Watch, timeout: float | int) -> None:
    """Ends in good order, together with the others."""
    watch.announce_end("left")
    try:
        launched._wait_for(lambda: watch.left, "the end", timeout)
    except TimeoutError as error:
        _fail(watch, error)
    watch.close()
    jax.distributed.shutdown()


def _fail(watch: Watch, error: BaseException) -> Never:
    """Ends this process because of its error, unless that is only what a lost process led to."""
    if _from_a_collective(error):
        watch.wait_for_verdict()
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        text = f"exit code {code}"
        if not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    else:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        text = traceback.format_exception_only(error)[-1].strip()
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        watch.announce_end("failed", text)
        watch.wait_until_heard()
    except Exception:  # process 0 is gone, so the others know
        pass
    os._exit(code)


def _from_a_collective(error: BaseException | None) -> bool:
    """Whether a broken connection may be the reason; JAX has no class of its own for these."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
