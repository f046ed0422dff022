"""Sharded training steps as scheduled for H200s: what travels beneath matrix products."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from experiments.overlap_report import AXIS, Case, build
from jaxrec.distributed import Machine, Schedule, XlaOptions, all_to_all_start, timeline
from pallas_kernels.aot import aot_available, compile_for_h200, h200_mesh

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]


def schedule(case, *, prioritized=True, **options):
    mesh = h200_mesh({AXIS: case.devices})
    step = build(case, mesh, prioritized=prioritized)
    return step.schedule(mesh, XlaOptions(**options).compiler_options())


def rows_and_gradients(case, found):
    shape = f"f32[{case.devices},{case.capacity['items']},{case.row_width}]"
    return [c for c in found.of_kind("all-to-all") if c.result == shape]


@pytest.mark.parametrize("case", [Case(8, layers=3), Case(256)], ids=["8", "256"])
def test_rows_and_gradients_travel_beneath_products_in_both_directions(case):
    """The published sizes; with 8 devices three of the eight layers suffice.

    All buffers are where copy engines can take them, which changes nothing of the schedule.
    """
    found, machine = schedule(case, symmetric_buffers=True), Machine.h200(case.devices)
    assert all(c.symmetric for c in found.collectives)
    early = rows_and_gradients(case, found)
    assert len(early) == 2, "deferred gradients, and the next batch's rows"
    hidden = found.hidden(machine)
    assert all(hidden[c.name] == 1 for c in early)
    score, with_sums = found.overlap_score(machine, "all-to-all"), found.overlap_score(machine)
    print(f"{case.devices} devices: {score:.4f}, with the sums of gradients {with_sums:.4f}")
    assert score >= 0.95
    kinds = {c.name: c.kind for c in found.collectives}
    waiting = [s for s in timeline(found, machine) if s.waits and kinds[s.name] == "all-to-all"]
    sent = sum(c.sent_bytes for c in found.of_kind("all-to-all"))
    assert sum(s.seconds for s in waiting) <= 0.05 * sent / machine.link_bytes, "nor in a queue"
    assert with_sums >= 0.8, "buckets travel beneath the backward pass"
    assert all(c.start != c.done for c in found.of_kind("all-to-all")), "asynchronous"


def test_an_exchange_started_by_hand_travels_beneath_what_stands_before_its_done():
    mesh = h200_mesh({AXIS: 8})

    def step(rows, x, w):
        under_way = all_to_all_start(rows, AXIS, split_axis=0, concat_axis=0)
        for _ in range(3):
            x = x @ w
        return under_way.done(), x

    specs = (P(AXIS), P(AXIS), P())
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(AXIS))
    shapes = [jax.ShapeDtypeStruct((8 * 1024, 1024), jnp.bfloat16)] * 2
    shapes.append(jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16))
    compiled = compile_for_h200(
        mapped, *shapes, mesh=mesh, in_shardings=specs, out_shardings=(P(AXIS),) * 2,
        compiler_options=XlaOptions().compiler_options(),
    )  # fmt: skip
    found = Schedule.read(compiled.hlo_text)
    (exchange,) = found.of_kind("all-to-all")
    assert len(found.beside(exchange)) == 3
    assert "all_to_all_start" in compiled.hlo_text, "JAX's own half, not the plain collective"


def test_without_early_starts_the_scheduler_trusts_the_link_between_hosts():
    case = Case(256)
    found = schedule(case, start_early=False, parallel_collectives=1)
    assert found.overlap_score(Machine.h200(256), "all-to-all") < 0.3
    assert not any(c.symmetric for c in found.collectives), "nobody asked for it"


def test_the_plain_step_waits_for_its_rows():
    """Its gradients may travel beside those of the weights."""
    case, machine = Case(8, layers=3), Machine.h200(8)
    found = schedule(case, prioritized=False)
    there, back = (found.hidden(machine)[c.name] for c in rows_and_gradients(case, found))
    assert (there, back) == (0, 1)
