"""Schedules read from the text of a program."""

import dataclasses

import pytest

from jaxrec.distributed import Machine, Schedule, timeline

TEXT = """HloModule m, is_scheduled=true, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%inner (p: bf16[1000,64]) -> bf16[1000,32] {
  %p = bf16[1000,64]{1,0} parameter(0)
  %w = bf16[32,64]{1,0:T(8,128)} constant({...})
  ROOT %dot.1 = bf16[1000,32]{1,0} dot(%p, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%plain (p: f32[8]) -> f32[8] {
  ROOT %add.1 = f32[8]{0} add(%p, %p)
}

ENTRY %main (a: bf16[1000,64]) -> f32[2] {
  %a = bf16[1000,64]{1,0} parameter(0)
  %all-to-all-start = ((f32[4,10]{1,0:S(1)}), f32[4,10]{1,0:S(1)}) all-to-all-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %all-reduce-start.1 = bf16[50]{0} all-reduce-start(%a), replica_groups=[1,2]<=[2], to_apply=%plain
  %product = bf16[1000,32]{1,0} fusion(%a), kind=kCustom, calls=%inner
  %sum = f32[8]{0} fusion(%a), kind=kLoop, calls=%plain
  %all-to-all-done = f32[4,10]{1,0} all-to-all-done(%all-to-all-start)
  %gemm = (f32[1000,16]{1,0}, s8[4]{0}) custom-call(%a, %a), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %all-reduce-done.1 = bf16[50]{0} all-reduce-done(%all-reduce-start.1)
  %kernel = (bf16[8]{0}) custom-call(%a), custom_call_target="mosaic_gpu_v2"
  %count = (s32[8]{0}) custom-call(%a), custom_call_target="mosaic_gpu_v2"
  %all-to-all.7 = f32[4,10]{1,0} all-to-all(%a), replica_groups=mesh['data'=2,'model'=4] {'model'}
  ROOT %r = f32[2]{0} copy(%a)
}
"""  # noqa: E501
PRODUCT, GEMM = 2 * 1000 * 32 * 64, 2 * 1000 * 16 * 64


@pytest.fixture
def schedule():
    return Schedule.read(TEXT)


def test_products_and_their_operations(schedule):
    found = {product.name: (product.result, product.flops) for product in schedule.products}
    assert found == {
        "product": ("bf16[1000,32]", PRODUCT),
        "gemm": ("(f32[1000,16], s8[4])", GEMM),
        "kernel": ("(bf16[8])", 0),
    }


def test_collectives_and_what_they_send(schedule):
    asynchronous, reduced, waiting = schedule.collectives
    assert asynchronous.result == "f32[4,10]"
    assert (asynchronous.group_size, asynchronous.sent_bytes) == (4, 160 * 3 / 4)
    assert (reduced.kind, reduced.sent_bytes) == ("all-reduce", 100 / 2 * 2)
    assert waiting.start == waiting.done, "synchronous"
    assert waiting.group_size == 4
    assert [c.symmetric for c in schedule.collectives] == [True, False, False]
    assert [p.name for p in schedule.beside(asynchronous)] == ["product"]
    assert [p.name for p in schedule.beside(reduced)] == ["product", "gemm"]
    assert schedule.beside(waiting) == (), "nothing beside it is seen"


def test_collectives_hide_beneath_products_one_after_the_other(schedule):
    per_byte = PRODUCT / 120  # the product takes as long as the first exchange
    machine = Machine(flops=per_byte, link_bytes=1.0)
    hidden = schedule.hidden(machine)
    assert hidden["all-to-all-start"] == pytest.approx(1)
    assert hidden["all-reduce-start.1"] == pytest.approx(GEMM / PRODUCT * 120 / 100)
    assert hidden["all-to-all.7"] == 0
    assert schedule.overlap_score(machine, "all-to-all") == pytest.approx(0.5)
    assert schedule.overlap_score(machine, "all-gather") == 1, "nothing is sent"
    slower = dataclasses.replace(machine, flops=per_byte / 10)
    assert all(schedule.hidden(slower)[name] == 1 for name in list(hidden)[:2])


def test_a_program_without_a_schedule_is_refused():
    with pytest.raises(ValueError, match="no schedule"):
        Schedule.read("HloModule m, entry_computation_layout={()->f32[]}\n")


def test_machines_differ_by_how_far_the_exchange_goes():
    assert Machine.h200(8).link_bytes > Machine.h200(256).link_bytes


def test_timeline_stops_where_a_collective_is_late(schedule):
    """In units of time: the product takes 4, the exchange 12, the reduction behind it 10."""
    machine = Machine(flops=PRODUCT / 4, link_bytes=10.0)
    spans = {(span.row, round(span.start, 6)): span.seconds for span in timeline(schedule, machine)}
    assert spans == pytest.approx(
        {
            ("all-to-all", 0): 12,
            ("all-reduce", 12): 10,  # one link: one after the other
            ("products", 0): 4,
            ("waiting", 4): 8,
            ("products", 12): 2,
            ("waiting", 14): 8,
            ("products", 22): 0,
            ("all-to-all", 22): 12,
            ("waiting", 22): 12,
        }
    )
