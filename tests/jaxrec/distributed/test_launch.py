"""Processes that come together, lose one another in every way, and end with a named reason."""

import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import ended, free_port, python, started

from jaxrec.distributed import EXIT_PEER_LOST, EXIT_PREEMPTED, LaunchConfig, LaunchError, launch
from jaxrec.distributed.launchers import Place
from jaxrec.distributed.roll_call import roll_call

WORKER = Path(__file__).parent / "launch_worker.py"


def called(port, numbers, counts=None, timeout=5.0, host="localhost") -> list[Any]:
    """What each process's roll call gives, its error's text where it fails."""

    def answer(number, count):
        try:
            return roll_call(Place("arguments", f"{host}:{port}", count, number, None), timeout)
        except LaunchError as error:
            return str(error)

    counts = counts or [len(numbers)] * len(numbers)
    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(answer, numbers, counts))


def test_everyone_hears_of_everyone():
    answers = called(free_port(), [2, 0, 1])
    assert answers[0] == answers[1] == answers[2]
    assert [peer.process for peer in answers[0]] == [0, 1, 2]


def test_strangers_are_not_counted():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(called, port, [0], [2])
        time.sleep(0.5)
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\n\n")
        assert called(port, [1], [2])[0] == first.result()[0]


@pytest.mark.parametrize(
    ("numbers", "counts", "message"),
    [
        ([0, 1], [3, 3], r"2 of 3 processes came within 1 s. Missing: 2. Here: process 0 \(.*pid"),
        ([0, 1], [2, 3], "process 1 .* was started as one of 3 processes, but process 0 as one of"),
        ([0, 1, 1], [3, 3, 3], "process 1 is there twice"),
        ([1], [2], "process 1 could not reach the coordinator at .* within 1 s .*refused"),
    ],
)
def test_who_is_missing_or_does_not_fit_is_named(numbers, counts, message):
    for answer in called(free_port(), numbers, counts, timeout=1.0):
        assert re.search(message, answer)


def test_ports_in_use_and_unknown_hosts_are_named():
    with socket.create_server(("", free_port())) as other:
        answer = called(other.getsockname()[1], [0], [2])[0]
    assert "cannot listen on port" in answer
    assert "Give another port" in answer
    answer = called(free_port(), [1], [2], timeout=0.2, host="no-such-host.invalid")[0]
    assert "could not reach the coordinator at no-such-host.invalid" in answer


def test_one_process_is_joined_to_nobody():
    with launch(LaunchConfig(num_processes=1)) as launched:
        assert launched.is_first
        assert launched.num_processes == 1
        launched.barrier("alone", timeout=1)
    with pytest.raises(KeyError), launch(LaunchConfig(num_processes=1)):
        raise KeyError


def run(event, victim):
    port = free_port()
    return started([python(WORKER, port, 2, number, event, victim) for number in range(2)])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named(victim):
    with run("kill", victim) as processes:
        dead, left = ended(processes[victim]), ended(processes[1 - victim])
    assert dead.code == -signal.SIGKILL
    assert left.code == EXIT_PEER_LOST, left.errors
    named = (
        rf"jaxrec: process {victim} \(.*, pid {processes[victim].pid}\).* is lost: its last sign"
    )
    assert re.search(named, left.errors)


@pytest.mark.slow
def test_an_error_in_one_ends_the_other_with_its_words():
    with run("raise", 1) as processes:
        failed, left = ended(processes[1]), ended(processes[0])
    assert failed.code == 1
    assert "ValueError: broken" in failed.errors
    assert left.code == EXIT_PEER_LOST
    named = (
        f"process 1 ({socket.gethostname()}, pid {processes[1].pid}) ended with ValueError: broken"
    )
    assert named in left.errors


def wait_for_event(process):
    for line in process.stdout:
        if line.startswith("now"):
            return
    raise AssertionError("the worker ended early")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_and_ends_when_it_wakes(victim):
    with run("hang", victim) as processes:
        wait_for_event(processes[victim])
        processes[victim].send_signal(signal.SIGSTOP)
        left = ended(processes[1 - victim])
        processes[victim].send_signal(signal.SIGCONT)
        woken = ended(processes[victim])
    assert left.code == EXIT_PEER_LOST
    assert f"process {victim} ({socket.gethostname()}, pid {processes[victim].pid})" in left.errors
    assert woken.code == EXIT_PEER_LOST


@pytest.mark.slow
def test_a_short_stop_is_survived_and_barriers_name_who_is_missing():
    with run("barrier", 1) as processes:
        wait_for_event(processes[1])
        processes[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        processes[1].send_signal(signal.SIGCONT)
        results = [ended(process) for process in processes]
    codes = [result.code for result in results]  # they agreed on it, so it is no failure
    assert codes == [EXIT_PREEMPTED] * 2, results[0].errors + results[1].errors
    assert all("sum 3.0" in result.out for result in results)
    assert "barrier 'alone': process 0 (" in results[1].out
