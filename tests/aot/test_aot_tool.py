"""The device-less compile itself: what it reports, and that it leaves the process as it was."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec

from pallas_kernels import aot
from pallas_kernels.aot import aot_available, compile_for_h200, h200_mesh

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
VECTOR = jax.ShapeDtypeStruct((1 << 16,), jnp.float32)


def scale(x):
    """A kernel that takes 1 KB of shared memory."""

    def body(x_ref, o_ref, scratch):
        rows = pl.ds(lax.axis_index("i") * 256, 256)
        scratch[...] = x_ref[rows] * 3
        o_ref[rows] = scratch[...]

    return plgpu.kernel(
        body,
        out_type=x,
        grid=(x.shape[0] // 256,),
        grid_names=("i",),
        scratch_types=[plgpu.SMEM((256,), jnp.float32)],
        kernel_name="scale",
    )(x)


def test_mosaic_kernel_is_reported():
    report = compile_for_h200(scale, VECTOR)
    kernel = report.kernel("scale_mosaic_gpu")
    assert 8 <= kernel.registers <= 64
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
    assert kernel.smem_bytes == 1024
    assert kernel.count("LDG") == 1
    assert kernel.count("STS.64") == kernel.count("LDS.64") == 1
    assert kernel.count("LDG.E.6") == 0, "a modifier counts whole"
    assert "scale_mosaic_gpu" in report.hlo_text
    with pytest.raises(ValueError, match="expected one kernel with 'other'"):
        report.kernel("other")


def test_loops_of_a_disassembly():
    lines = ["MOV R1, c[0x0][0x28]", "IADD3 R2, R2, 0x1", "@P1 BRA 0x20", "@!UP0 FADD R3, R2"]
    lines += ["BRA 0x10", "@P2 BRA 0x70", "EXIT", "@!P3 BRA 0x70", "BRA 0x20"]
    listing = "".join(f"    /*{16 * n:04x}*/   {line} ;\n" for n, line in enumerate(lines))
    module = aot._Module("", 0)
    vars(module)["instructions"] = aot._parse_sass(f"\tFunction : own\n{listing}")
    kernel = aot.KernelReport("own", module)
    assert kernel.instructions.total() == len(lines)
    inner, outer = kernel.loops
    assert inner == {"BRA": 1}
    assert outer == {"IADD3": 1, "BRA": 2, "FADD": 1}


def test_the_same_kernel_is_reported_again():
    first, second = (compile_for_h200(scale, VECTOR) for _ in range(2))
    assert first.kernels == second.kernels


def test_xla_kernels_are_reported():
    report = compile_for_h200(lambda x: jnp.sum(jnp.sin(x)), VECTOR)
    assert report.kernels
    assert all(kernel.registers > 0 for kernel in report.kernels)
    assert sum(kernel.count("LDG") for kernel in report.kernels) > 0


def test_process_stays_on_the_cpu():
    os.environ.pop("MOSAIC_GPU_DUMP_TO", None)
    compile_for_h200(lambda x: x + 1, VECTOR)
    assert "MOSAIC_GPU_DUMP_TO" not in os.environ
    assert jnp.zeros(3).devices() == {jax.devices()[0]}


def test_collectives_of_eight_gpus():
    mesh = h200_mesh({"data": 4, "model": 2})

    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec())
    def total(x):
        return lax.psum(jnp.sum(x), "data")

    report = compile_for_h200(
        total, VECTOR, mesh=mesh, in_shardings=PartitionSpec("data"), out_shardings=PartitionSpec()
    )
    assert "all-reduce" in report.hlo_text
    assert f"f32[{VECTOR.shape[0] // 4}]" in report.hlo_text


def test_too_much_shared_memory_is_refused():
    def body(x_ref, o_ref, scratch):
        scratch[...] = x_ref[...]
        o_ref[...] = scratch[...]

    def greedy(x):
        scratch = [plgpu.SMEM(x.shape, x.dtype)]
        return plgpu.kernel(body, out_type=x, scratch_types=scratch)(x)

    with pytest.raises(Exception, match="exceeds available shared memory"):
        compile_for_h200(greedy, VECTOR)


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(aot, "_tool", lambda name: None)
    assert "no ptxas or cuobjdump found" in (aot_available.__wrapped__() or "")
