"""The full softmax over ten million items as compiled for an H200."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxrec.ops.losses import full_softmax_loss
from pallas_kernels.aot import aot_available, compile_for_h200

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
MAX_LOGITS = 1 << 22


def test_memory_is_that_of_a_tile_and_sums_are_in_order():
    sizes = ((1024, 64), (10_000_001, 64))
    hidden, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sizes)
    ids = jax.ShapeDtypeStruct((1024,), jnp.int32)

    def loss(hidden, table, ids):
        return full_softmax_loss(hidden, table, ids, MAX_LOGITS)

    report = compile_for_h200(jax.value_and_grad(loss, argnums=(0, 1)), hidden, table, ids)
    assert report.temp_bytes < 2 * 4 * MAX_LOGITS  # all logits would be 41 GB
    for kernel in report.kernels:
        assert not re.findall(r"\b(?:atom|red)\.(?:global|relaxed|acq_rel|release)", kernel.ptx)
