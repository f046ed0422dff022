"""Sharded training steps as scheduled for eight H200: what travels beneath matrix products."""

import dataclasses

import pytest

from experiments.overlap_report import AXIS, Case, build
from jaxrec.distributed import Machine, XlaOptions
from pallas_kernels.aot import aot_available, h200_mesh

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
# Tokens and rows an eighth of the published, which leaves the ratio of bytes to products as it is.
CASE = Case(tokens=4096, layers=3, num_rows=100_000)
MACHINE = Machine.h200(8)


def schedule(case, *, prioritized, options=None):
    mesh = h200_mesh({AXIS: case.devices})
    return build(case, mesh, prioritized=prioritized).schedule(
        mesh, (options or XlaOptions()).compiler_options()
    )


def test_rows_and_gradients_travel_beneath_products_in_both_directions():
    found = schedule(CASE, prioritized=True)
    places = CASE.capacity["items"]
    early = [c for c in found.of_kind("all-to-all") if c.result == f"f32[8,{places},512]"]
    assert len(early) == 2, "deferred gradients, and the next batch's rows"
    hidden = found.hidden(MACHINE)
    assert all(hidden[c.name] == 1 for c in early)
    assert found.overlap_score(MACHINE, "all-to-all") >= 0.95
    # Where a quarter of the rows were shared by both batches, their part would be waited for.
    assert all(c.start != c.done for c in found.of_kind("all-to-all")), "asynchronous"


def test_the_plain_step_waits():
    found = schedule(dataclasses.replace(CASE, layers=1), prioritized=False)
    assert found.overlap_score(MACHINE, "all-to-all") < 0.6
