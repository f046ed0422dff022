"""Transfers run beside computation: compiled for an H200, start and done bracket the products."""

import re

import jax
import jax.numpy as jnp
import pytest

from experiments import sm_tax
from jaxrec.distributed import XlaOptions
from pallas_kernels.aot import aot_available, compile_for_h200

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]


WORKS = sm_tax.matmul(512, 3), sm_tax.attention(1024, 512)


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
@pytest.mark.parametrize("name", [sm_tax.ENGINE, "16 blocks"])
def test_a_transfer_is_under_way_while_the_work_runs(name, work):
    program = sm_tax.beside(work, sm_tax.transfers([16])[name])
    shapes = jax.ShapeDtypeStruct((64 * 16, 128), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    report = compile_for_h200(
        program, *shapes, *work.inputs, compiler_options=XlaOptions().compiler_options()
    )
    entry = report.hlo_text.split("\nENTRY ", 1)[1]
    steps = re.findall(r"= .*? (call-start|call-done|copy-start|copy-done|custom-call)\(", entry)
    moves = ["copy-start", "call-done", "copy-done"]
    expected = moves if name == sm_tax.ENGINE else ["custom-call", "call-done"]
    assert steps == ["call-start", *expected], "the work starts, and is done after the transfer has"
    assert '_xla_stream_annotation="1"' in entry
    copies = [k for k in report.kernels if k.name.startswith(sm_tax.KERNEL_NAME)]
    assert len(copies) == (name != sm_tax.ENGINE)
    assert all(kernel.spill_store_bytes == 0 for kernel in copies)
