"""The MoE kernels as the compiler sees them: no spills, full tensor-core tiles, bounded memory."""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import aot_available, compile_for_h200
from pallas_kernels.moe import (
    MoeConfig,
    MoeShape,
    moe_dispatch,
    moe_ffn,
    moe_memory,
    saved_bytes,
)
from pallas_kernels.moe.groups import gather_rows, group_rows
from pallas_kernels.moe.mosaic_gpu import project
from pallas_kernels.moe.ref import Experts
from pallas_kernels.moe.workloads import WORKLOADS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
# Matrix instructions [64, columns, 16] that a warpgroup issues for a stage 64 deep: the fewest that
# the tile can do with, 128 columns for each of two accumulators and 256 for one.
STAGE = {
    "moe_project": ("HGMMA.64x128x16", 8),
    "moe_contract": ("HGMMA.64x256x16", 4),
    "moe_project_gradient": ("HGMMA.64x256x16", 4),
    "moe_input_weight_gradient": ("HGMMA.64x128x16", 8),
    "moe_output_weight_gradient": ("HGMMA.64x256x16", 4),
    "moe_contract_gradient": ("HGMMA.64x256x16", 4),
}
LOADS = dict(zip(STAGE, (3, 2, 2, 4, 3, 2), strict=True))  # copies into a stage


def gemms(report):
    """The kernels that multiply; the one that counts pairs has a test of its own."""
    names = [kernel for kernel in report.kernels if "mosaic" in kernel.name]
    return [kernel for kernel in names if "moe_dispatch" not in kernel.name]


def check(report, names):
    for name in names:
        kernel = report.kernel(f"{name}_mosaic_gpu")
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0, name
        assert kernel.registers <= 168, "three warpgroups fit 65,536 registers"
        instruction, count = STAGE[name]
        issued = kernel.count(instruction)
        assert issued == kernel.count("HGMMA"), f"{name} has matrix instructions of another shape"
        assert issued > 0
        assert issued % count == 0, "a whole number of stages"
        assert kernel.count("UTMALDG") >= 2
        assert kernel.count("UTMASTG") >= 2
    assert len(gemms(report)) == len(names)
    for kernel in report.kernels:
        atomics = re.findall(r"\b(?:atom|red)\.(?:global|relaxed|acq_rel|release)\S*", kernel.ptx)
        assert not atomics, f"{kernel.name} would not be deterministic"


class Tile(NamedTuple):
    """What a tile of 128 rows and 256 columns costs each of a multiprocessor's four schedulers.

    Attributes:
      products: cycles of its matrix instructions, at 2048 multiply-adds a cycle: the least that it
        can take, as none of them is narrower than the tile allows or issued twice (`STAGE`).
      beside: instructions issued meanwhile, by a warp of either compute warpgroup and a producer's.
      after: instructions of the epilogue, by two warps, while this tile has no products.
    """

    products: int
    beside: int
    after: int


def tile_of(kernel, steps: int) -> Tile:
    """Of a kernel whose sum takes so many stages, each 64 deep."""

    def count(loop, opcode):
        return sum(loop[name] for name in loop if name.startswith(opcode))

    name = kernel.name.removesuffix("_mosaic_gpu_kernel")
    a_stage = STAGE[name][1]
    # The loop over stages has the first one before it; or it is unrolled into that over tiles.
    *inner, tile = [loop for loop in kernel.loops if count(loop, "HGMMA")]
    stages = [count(loop, "HGMMA") // a_stage for loop in (*inner, tile)]
    assert stages in ([1, 2], [steps]), name
    loop = inner[0].total() if inner else 0
    after = tile.total() - (2 * loop if inner else 0)  # an unrolled one all counts as epilogue
    loads = next(loop for loop in kernel.loops if count(loop, "UTMALDG"))
    load = loads.total() * LOADS[name] / count(loads, "UTMALDG")
    return Tile(1024 * steps, round(steps * (2 * loop + load)), 2 * after)


def test_forward():
    workload = WORKLOADS["sonic_7b"]
    report = compile_for_h200(workload.run, *workload.shapes())  # no name means the kernel
    check(report, ["moe_project", "moe_contract"])
    rows, pairs = workload.rows_bound(), workload.num_pairs
    transient = 2 * rows * (workload.width + workload.hidden)  # one [P, D] at a time, and [P, H]
    assert report.temp_bytes < transient + 64 * pairs


@pytest.mark.parametrize("name", ["conf3", "sonic_7b"])
def test_gradient(name):
    workload = WORKLOADS[name]
    run = functools.partial(workload.gradient, backend="mosaic_gpu")
    report = compile_for_h200(run, *workload.shapes())
    check(report, list(STAGE))
    rows, pairs = workload.rows_bound(), workload.num_pairs
    sizes = (workload.num_tokens, workload.width, workload.hidden, workload.slots)
    # x_rows, dy_rows and later dx_rows; d_gate, d_up and the weighted activation.
    transient = 2 * rows * (2 * workload.width + 3 * workload.hidden)
    assert report.temp_bytes < saved_bytes(*sizes) + transient + 64 * pairs
    deep, wide = workload.width // 64, workload.hidden // 64
    rows_of_expert = workload.num_pairs // workload.num_experts // 64
    steps = dict(zip(STAGE, (deep, wide, deep, *[rows_of_expert] * 2, 2 * wide), strict=True))
    for gemm in gemms(report):
        own = gemm.name.removesuffix("_mosaic_gpu_kernel")
        tile = tile_of(gemm, steps[own])
        assert tile.beside <= 0.3 * tile.products, f"{own}: products would wait for instructions"
        # Differentiating the activation is more work than that beside rows shorter than 1536; the
        # README says what of it is arithmetic.
        least = max(tile.products, 1024 * 1536 // 64 * (own == "moe_project_gradient"))
        assert tile.after <= 0.3 * least, f"{own}: the epilogue is too long"


@pytest.mark.parametrize("activation", ["geglu", "silu"])
def test_biases_and_activations(activation):
    workload = WORKLOADS["tiny"]
    x, ids, gates, w_gate, w_up, w_down = workload.shapes()
    hidden = jax.ShapeDtypeStruct(w_up.shape[::2], jnp.bfloat16)
    biases = {"b_up": hidden, "b_down": jax.ShapeDtypeStruct(w_down.shape[::2], jnp.bfloat16)}
    if activation == "silu":
        w_gate = None
    else:
        biases["b_gate"] = hidden

    def run(x, ids, gates, w_gate, w_up, w_down, biases):
        def op(x, gates, w_gate, w_up, w_down, biases):
            weights = (w_gate, w_up, w_down)
            return moe_ffn(x, ids, gates, *weights, **biases, activation=activation)

        y, pull = jax.vjp(op, x, gates, w_gate, w_up, w_down, biases)
        return y, pull(x)

    report = compile_for_h200(run, x, ids, gates, w_gate, w_up, w_down, biases)
    kernels = gemms(report)
    assert len(kernels) == len(STAGE)
    for kernel in kernels:
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
        assert kernel.count("HGMMA") > 0


@pytest.mark.parametrize("name", ["conf1", "sonic_7b"])
def test_fetched_rows_need_no_copy(name):
    """The projection alone: gathered rows exist beside its results, or do not."""
    w = WORKLOADS[name]
    x, ids, _, *weights = w.shapes()

    def run(fetch, x, ids, w_gate, w_up, w_down):
        dispatch = moe_dispatch(ids, num_experts=w.num_experts)
        groups = group_rows(dispatch)
        projected = project(
            x if fetch else gather_rows(x, groups),
            groups,
            dispatch.expert_token_offsets,
            Experts(w_gate, w_up, w_down, None, None, None),
            num_pairs=w.num_pairs,
            dtype=x.dtype,
            activation="swiglu",
            keep=False,
            fetches=fetch,
            config=MoeConfig(),
        )
        return projected.hidden

    gathered, fetched = (
        compile_for_h200(functools.partial(run, fetch), x, ids, *weights) for fetch in (False, True)
    )
    saved, rows = gathered.temp_bytes - fetched.temp_bytes, w.rows_bound()
    # The rows themselves, less their tokens' numbers, which the fetch reads from memory.
    assert 2 * rows * w.width - 8 * rows <= saved <= 2 * rows * w.width
    check(fetched, ["moe_project"])
    kernel, other = (r.kernel("moe_project_mosaic_gpu") for r in (fetched, gathered))
    assert kernel.count("HGMMA") == other.count("HGMMA")
    assert kernel.count("LDGSTS.E.BYPASS.128") == kernel.count("LDGSTS") == 8, "16 bytes a thread"
    assert kernel.count("UTMALDG") == 2, "the weights"


@pytest.mark.parametrize(("activation", "save"), [("swiglu", "gate_up"), ("silu", "x")])
def test_f32(activation, save):
    """The same kernels in six times the steps, and a peak that is predicted."""
    w = WORKLOADS["conf6"]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in w.shapes()]
    x, up, down = (jax.ShapeDtypeStruct(shapes[n].shape, jnp.float32) for n in (0, 4, 5))
    weights = (None if activation == "silu" else up, up, down)

    def run(x, ids, gates, weights, dy):
        def op(x, gates, weights):
            return moe_ffn(x, ids, gates, *weights, activation=activation, save=save)

        y, pull = jax.vjp(op, x, gates, weights)
        return y, pull(dy)

    report = compile_for_h200(run, x, *shapes[1:3], weights, x)
    assert "reduce-precision" in report.hlo_text, "the high part is not the value itself"
    if activation == "swiglu":
        check(report, list(STAGE))
    for kernel in gemms(report):
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
        assert kernel.count("HGMMA") > 0
    sizes = (w.num_tokens, w.width, w.hidden, w.num_experts, w.slots)
    memory = moe_memory(MoeShape(*sizes, activation=activation, save=save, itemsize=4))
    compiled = memory.arguments + memory.results + report.temp_bytes
    assert abs(memory.peak / compiled - 1) < 0.1


def test_chunks_bound_the_memory():
    workload = dataclasses.replace(WORKLOADS["gh200"], chunk_tokens=1024, save="x")
    report = compile_for_h200(workload.run, *workload.shapes())
    check(report, ["moe_project", "moe_contract"])
    chunk = dataclasses.replace(workload, num_tokens=1024)
    transient = 2 * chunk.rows_bound() * (workload.width + workload.hidden)
    results = 2 * workload.num_tokens * workload.width
    assert report.temp_bytes < transient + results + 64 * chunk.num_pairs


@pytest.mark.parametrize("num_experts", [8, 256])
def test_dispatch_counts_on_tensor_cores_in_a_few_kernels_without_a_loop(num_experts):
    ids = jax.ShapeDtypeStruct((24_576, 8), jnp.int32)
    report = compile_for_h200(functools.partial(moe_dispatch, num_experts=num_experts), ids)
    kernel = report.kernel("moe_dispatch_mosaic_gpu")  # no name means the kernel
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
    issued = kernel.count(f"HGMMA.64x{max(16, num_experts)}x16")
    assert issued == kernel.count("HGMMA")
    assert issued == 2 * 64 // 16, "two products of 64 pairs, in a loop that is not unrolled"
    assert " while(" not in report.hlo_text
    assert len(report.kernels) <= 7
    assert report.temp_bytes < 8 * ids.size


def test_dispatch_of_many_experts_and_by_name_is_left_to_xla():
    ids = jax.ShapeDtypeStruct((24_576, 8), jnp.int32)
    for how in ({"num_experts": 128, "method": "count"}, {"num_experts": 257}):
        report = compile_for_h200(functools.partial(moe_dispatch, **how), ids)
        assert not [kernel for kernel in report.kernels if "mosaic" in kernel.name]
