"""Brings the processes of a job together before JAX does, so that who is missing has a name.

JAX's own service ends a process with a stack trace where another one does not come.
"""

import json
import os
import socket
import time
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

from jaxrec.distributed.launchers import LaunchError, Place, split_address

LINE_BYTES = 1 << 24
LINE_TIMEOUT = 5.0  # seconds that a connection has to say who it is
RETRY_S = 0.1


class Peer(NamedTuple):
    """One of the processes."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} ({self.host}, pid {self.pid})"


def roll_call(place: Place, timeout: float | int) -> list[Peer]:
    """Waits until every process has come to the coordinator's address.

    Process 0 listens there, and leaves the port free again for JAX's service.

    Returns:
      all processes, by their numbers.

    Raises:
      LaunchError: the address cannot be reached or is in use; processes are missing, come twice,
        or were started with another number of processes.
    """
    own = Peer(place.process_id, socket.gethostname(), os.getpid())
    if place.process_id == 0:
        return _call(place, own, time.monotonic() + timeout, timeout)
    return _answer(place, own, time.monotonic() + timeout, timeout)


def _call(place: Place, own: Peer, end: float, timeout: float | int) -> list[Peer]:
    """Process 0's side: hears everyone, then tells everyone the same."""
    present = {0: own}
    with ExitStack() as stack:
        server = stack.enter_context(_listen(place))
        connections: list[socket.socket] = []
        trouble = ""
        while len(present) < place.num_processes and not trouble:
            server.settimeout(max(0.001, end - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                trouble = _missing_message(place, present, timeout)
                break
            stack.enter_context(connection)
            said = _heard(connection)
            if said is None:  # a port scanner, not one of ours
                continue
            connections.append(connection)
            peer = Peer(*said["peer"])
            trouble = _misfit(place, present, peer, said["num_processes"])
            present[peer.process] = peer
        server.close()
        peers = [present[number] for number in sorted(present)]
        for connection in connections:
            _say(connection, {"error": trouble, "peers": peers})
        if trouble:
            raise LaunchError(trouble)
    return peers


def _listen(place: Place) -> socket.socket:
    host, port = split_address(place.coordinator)
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise LaunchError(
            f"process 0 cannot listen on port {port} of {socket.gethostname()} ({error.strerror}). "
            f"Give another port in the coordinator's address, {host}:…, to all processes"
        ) from error


def _misfit(place: Place, present: dict[int, Peer], peer: Peer, count: int) -> str:
    if count != place.num_processes:
        return (
            f"{peer} was started as one of {count} processes, but process 0 as one of "
            f"{place.num_processes}: start all with the same number"
        )
    if peer.process in present:
        return (
            f"process {peer.process} is there twice: as {present[peer.process]} and as {peer}. "
            "Every process needs a number of its own, from 0"
        )
    return ""


def _missing_message(place: Place, present: dict[int, Peer], timeout: float | int) -> str:
    missing = [n for n in range(place.num_processes) if n not in present]
    here = ", ".join(str(present[number]) for number in sorted(present))
    return (
        f"{len(present)} of {place.num_processes} processes came within {timeout:g} s. Missing: "
        f"{', '.join(map(str, missing))}. Here: {here}. Look at the missing ones' output, and "
        f"whether they can reach {place.coordinator}"
    )


def _answer(place: Place, own: Peer, end: float, timeout: float | int) -> list[Peer]:
    """The others' side: says who it is, and hears how it went."""
    address = split_address(place.coordinator)
    with _connect(place, address, end, timeout) as connection:
        _say(connection, {"peer": own, "num_processes": place.num_processes})
        # Process 0 may have begun later and wait for longer; its answer tells who is missing.
        reply = _heard(connection, timeout=2 * timeout)
    if reply is None:
        raise LaunchError(
            f"process 0 at {place.coordinator} ended before all processes had come; look at its "
            "output"
        )
    if reply["error"]:
        raise LaunchError(reply["error"])
    return [Peer(*peer) for peer in reply["peers"]]


def _connect(
    place: Place, address: tuple[str, int], end: float, timeout: float | int
) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address, timeout=max(0.1, end - time.monotonic()))
        except OSError as error:
            if time.monotonic() + RETRY_S >= end:
                raise LaunchError(
                    f"process {place.process_id} could not reach the coordinator at "
                    f"{place.coordinator} within {timeout:g} s ({error}). Is process 0 running, is "
                    "this its host and a port that firewalls let through?"
                ) from error
            time.sleep(RETRY_S)


def await_service(address: tuple[str, int]) -> None:
    """Waits for JAX's service to listen: its own client would sleep a second before it retries."""
    for _ in range(100):
        try:
            return socket.create_connection(address, timeout=1).close()
        except OSError:
            time.sleep(RETRY_S / 4)


def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # if it has gone, whoever waits for it will say so
        connection.sendall(json.dumps(message).encode() + b"\n")


def _heard(connection: socket.socket, timeout: float | int = LINE_TIMEOUT) -> dict[str, Any] | None:
    """The line that the other side sent; None if it sent none or something else."""
    connection.settimeout(timeout)
    try:
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(LINE_BYTES))
    except (OSError, ValueError):
        return None
    return (
        message if isinstance(message, dict) and ("peer" in message or "error" in message) else None
    )
