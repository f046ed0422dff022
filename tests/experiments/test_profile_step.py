"""The table by phase, from events made by hand and from a real trace."""

from collections import Counter
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import pytest

from experiments.profile_step import (
    by_phase,
    device_times,
    own_times,
    phase_of,
    phases_of_program,
)


@dataclass
class Event:
    name: str
    start_ns: float
    duration_ns: float
    stats: list = field(default_factory=list)

    def __post_init__(self):
        self.stats = [("hlo_op", self.name)] if self.name != "host" else []


@pytest.mark.parametrize(
    ("op_name", "phase"),
    [
        ("jit(step)/jvp(encode)/dot_general", "encode"),
        ("jit(step)/transpose(jvp(encode))/mul", "encode, gradient"),
        ("jit(step)/jvp(loss)/while/body/exp", "loss"),
        ("jit(step)/update/sqrt", "update"),
        ("jit(step)/draw/threefry", "draw"),
        ("jit(step)/slice", "other"),
        ("jit(step)/glossary/add", "other"),
    ],
)
def test_phases(op_name, phase):
    assert phase_of(op_name) == phase


def test_times_do_not_count_what_is_inside_twice():
    events = [
        Event("while", 0, 100),
        Event("body", 10, 30),
        Event("host", 12, 3),
        Event("body", 50, 40),
        Event("after", 100, 5),
    ]
    assert own_times(iter(events)) == {"while": 30, "body": 70, "after": 5}


def test_table():
    times = Counter({"a": 3e6, "b": 1e6, "c": 4e6})
    rows = by_phase(times, {"a": "loss", "b": "loss"}, 2)
    assert rows == [
        {"phase": "loss", "ms a step": "2.000", "share": "50.0 %"},
        {"phase": "other", "ms a step": "2.000", "share": "50.0 %"},
    ]


def test_a_real_trace(tmp_path):
    @jax.jit
    @jax.grad
    def gradient(x):
        with jax.named_scope("encode"):
            y = jnp.tanh(x @ x)
        with jax.named_scope("loss"):
            return jnp.sum(y @ y)

    x = jnp.ones((128, 128))
    phases = phases_of_program(gradient.lower(x).compile().as_text())
    assert {"encode", "encode, gradient"} <= set(phases.values())
    gradient(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        gradient(x).block_until_ready()
    times = device_times(tmp_path)
    assert {phases[name] for name in times if name in phases} >= {"encode", "encode, gradient"}
    assert sum(times.values()) > 0
