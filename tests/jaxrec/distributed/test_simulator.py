"""The event engine on cases worked out by hand, and what must hold of any simulated training."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from length_cases import kuairand_1k, zipf

from jaxrec.distributed.simulator import (
    SOURCES,
    MachineConstants,
    Mechanisms,
    ModelConstants,
    Simulation,
    simulate,
)
from jaxrec.distributed.simulator.engine import COMPUTE

ALL = Mechanisms("lpt", prioritised=True, sm_free=True)


def batches(ranks=8, samples=16, steps=7, seed=0):
    return [zipf(ranks * samples, seed + s).reshape(ranks, samples) for s in range(steps)]


def run(mechanisms=ALL, lengths=None, machine=None, model=None, **options):
    return simulate(
        batches() if lengths is None else lengths, machine or MachineConstants(),
        model or ModelConstants(), mechanisms, **options,
    )  # fmt: skip


def test_ops_queue_for_resources_and_wait_for_causes():
    simulation = Simulation(1)
    copy = simulation.add("copy", 0, 2.0, ["dma"])
    first = simulation.add("first", 0, 3.0, [COMPUTE], [copy])
    second = simulation.add("second", 0, 1.0, [COMPUTE])
    other = simulation.add("other", 0, 1.5, ["dma"])
    timeline = simulation.run()
    assert timeline.ended[[copy, first, second, other]].tolist() == [2, 5, 6, 3.5]
    assert timeline.began[second] == 5, "queues keep the program's order"


def test_a_collective_waits_for_all_and_takes_sms_meanwhile():
    simulation = Simulation(2)
    late = [simulation.add("before", rank, rank * 4.0, ["host"]) for rank in range(2)]
    group = simulation.add_collective("sum", 2.0, ["network"], [[op] for op in late], sms=0.5)
    work = [simulation.add("work", rank, 6.0, [COMPUTE]) for rank in range(2)]
    timeline = simulation.run()
    assert timeline.arrived[group].tolist() == [0, 4]
    assert timeline.began[group].tolist() == [4, 4]
    assert timeline.ended[group].tolist() == [6, 6]
    # Rank 0 works at half speed for 6 s, then alone; rank 1 is slowed from 4 to 6 only.
    assert timeline.ended[work].tolist() == [9, 7]


def test_two_takers_of_sms_add_up():
    simulation = Simulation(1)
    simulation.add("a", 0, 4.0, ["x"], sms=0.25)
    simulation.add("b", 0, 2.0, ["y"], sms=0.25)
    work = simulation.add("work", 0, 4.0, [COMPUTE])
    # 2 s at 1/2, 2 s at 3/4, the remaining 1.5 alone.
    assert simulation.run().ended[work] == pytest.approx(5.5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_ranks is 0"):
        Simulation(0)
    simulation = Simulation(2)
    with pytest.raises(ValueError, match="not added before"):
        simulation.add("early", 0, 1.0, [], [5])
    with pytest.raises(ValueError, match=r"bad: -1\.0 seconds"):
        simulation.add("bad", 0, -1.0, [])
    with pytest.raises(ValueError, match="causes for 1 ranks; expected 2"):
        simulation.add_collective("bad", 1.0, [], [[]])
    simulation.run()
    with pytest.raises(RuntimeError, match="can be run once"):
        simulation.run()


@settings(max_examples=25, deadline=None)
@given(st.booleans(), st.booleans(), st.sampled_from([None, "lpt", "zigzag"]), st.integers(0, 99))
def test_all_time_is_accounted_for(prioritised, sm_free, strategy, seed):
    found = run(Mechanisms(strategy, prioritised, sm_free), batches(seed=seed))
    parts = (
        found.straggler_seconds + found.exposed_seconds + found.sm_tax_seconds
        + found.overhead_seconds
    )  # fmt: skip
    assert found.bubble_seconds == pytest.approx(parts, rel=1e-6, abs=1e-9)
    assert 0 <= found.bubble < 1


def test_equal_lengths_leave_no_stragglers():
    even = [np.full((8, 16), 700)] * 7
    found = run(Mechanisms(), even)
    assert found.max_over_mean == 1
    assert found.straggler_seconds == pytest.approx(0, abs=1e-9)


def test_work_is_the_same_whatever_is_switched_on():
    useful = [
        run(on).useful_seconds
        for on in (Mechanisms(), Mechanisms("lpt"), Mechanisms(prioritised=True), ALL)
    ]
    np.testing.assert_allclose(useful, useful[0], rtol=0.02)


def test_free_communication_and_even_lengths_leave_only_the_latency():
    machine = replace(
        MachineConstants(), nic=1e30, nvlink=1e30, pcie=1e30, latency=0.0, latency_per_node=0.0,
        plan_per_sample=0.0,
    )  # fmt: skip
    found = run(Mechanisms(), [np.full((16, 8), 700)] * 7, machine)
    assert found.bubble == pytest.approx(0, abs=1e-9)


def test_step_time_of_a_plain_even_step_by_hand():
    machine, model = replace(MachineConstants(), sm_share=0.0), ModelConstants()
    found = run(Mechanisms(), [np.full((8, 16), 700)] * 7, machine, model)
    compute = 16 * float(model.cost.sample_costs(np.array([700]))[0])
    rows = 16 * 700 * model.unique_share * model.width * model.bytes_per_value
    exchange = rows * 7 / 8 / machine.nvlink + machine.latency
    lookup = 2 * rows / (machine.hbm * machine.gather_efficiency)
    bucket = model.dense_params * model.bytes_per_gradient / model.buckets
    reduce = 2 * bucket * 7 / 8 / machine.nvlink + 2 * machine.latency
    dense = model.dense_params * model.optimizer_bytes / machine.hbm + model.per_step
    wanted = lookup + exchange + compute + max(reduce + exchange, reduce + dense) + lookup
    assert found.step_seconds == pytest.approx(wanted, rel=1e-6)


def test_each_mechanism_helps_where_it_should():
    plain, balanced, early, free = (
        run(on, [kuairand_1k(256, seed).reshape(16, 16) for seed in range(7)])
        for on in (Mechanisms(), Mechanisms("lpt"), Mechanisms("lpt", True), ALL)
    )
    assert balanced.straggler_seconds < 0.2 * plain.straggler_seconds
    assert early.exposed_seconds < balanced.exposed_seconds
    assert free.sm_tax_seconds < early.sm_tax_seconds
    assert plain.samples_per_second < balanced.samples_per_second < free.samples_per_second


def test_collisions_are_what_stays_exposed():
    lengths = [np.full((16, 16), 2_000)] * 7
    exposed = [
        run(Mechanisms(None, True), lengths, model=ModelConstants(collisions=share)).exposed_seconds
        for share in (0.01, 0.3, 1.0)
    ]
    assert exposed[0] < exposed[1] < exposed[2]
    plain = run(Mechanisms(), lengths).exposed_seconds
    assert exposed[2] == pytest.approx(plain, rel=0.1)


def test_a_slow_plan_is_no_longer_hidden():
    quick = run(ALL)
    slow = run(ALL, machine=replace(MachineConstants(), plan_per_sample=1e-3))
    assert slow.step_seconds > 5 * quick.step_seconds
    assert quick.overhead_seconds < 0.01 * quick.step_seconds


def test_jitter_makes_stragglers_that_no_plan_can_know():
    even = [np.full((8, 16), 4_000)] * 7
    calm, shaky = (
        run(ALL, even, replace(MachineConstants(), jitter=jitter)) for jitter in (0.0, 0.05)
    )
    assert calm.max_over_mean < 1.001
    assert shaky.straggler_seconds > calm.straggler_seconds + 0.01 * calm.step_seconds


def test_a_wrong_cost_balances_less():
    model = ModelConstants()
    wrong = replace(model.cost, per_token=0.0, per_token_squared=0.0, per_sample=1.0)
    assert run(plan_cost=wrong).max_over_mean > 1.3 * run().max_over_mean


def test_every_constant_has_a_source():
    named = {f.name for f in (*fields(MachineConstants), *fields(ModelConstants))}
    assert named == set(SOURCES)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="3 steps; expected at least 5"):
        run(lengths=batches(steps=3))
