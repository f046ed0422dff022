"""What a stack of HSTU blocks keeps on an H200 is what `hstu_block_saved_bytes` says."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxrec.ops.hstu_block import HSTUShape, HSTUWeights, hstu_block, hstu_block_saved_bytes
from pallas_kernels.aot import aot_available, compile_for_h200

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
TOKENS, WIDTH = 16_384, 256
SHAPE = HSTUShape(heads=2, qk_width=128, v_width=128, max_len=1024, dropout=0.2)
COLUMNS = 2 * SHAPE.heads * (SHAPE.qk_width + SHAPE.v_width)


def weights() -> HSTUWeights:
    sizes = (WIDTH,), (WIDTH,), (WIDTH, COLUMNS), (COLUMNS,), (SHAPE.gate_columns, WIDTH), (WIDTH,)
    shapes = (*sizes, (SHAPE.heads, SHAPE.max_len))
    arrays: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return HSTUWeights(*arrays)


def temporary(num_blocks: int) -> int:
    """Bytes of the gradients of a stack of blocks in bf16, beside arguments and results."""

    def loss(x, stack, offsets, key):
        for number, own in enumerate(stack):
            x = hstu_block(x, own, offsets, shape=SHAPE, key=jax.random.fold_in(key, number))
        return x.astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
    offsets = jax.ShapeDtypeStruct((33,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    stack = [weights()] * num_blocks
    return compile_for_h200(
        jax.grad(loss, (0, 1)), x, stack, offsets, key, kernels=False
    ).temp_bytes


def test_a_block_more_costs_what_it_saves():
    grown = temporary(3) - temporary(2)
    saved = hstu_block_saved_bytes(TOKENS, WIDTH, SHAPE, save="projections", itemsize=2)
    weights_in_bf16 = 2 * WIDTH * (COLUMNS + SHAPE.gate_columns)
    assert saved <= grown <= 1.01 * saved + weights_in_bf16
