"""f32 products on tensor cores that multiply bf16: values as sums of bf16 parts.

An f32 value has 24 significant bits and a bf16 value eight, so that three parts hold it exactly.
Of the nine products of two values' parts the three smallest are left out: together at most 2^-23 of
the whole, as much as f32 itself rounds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Parts of the left and the right operand, 0 the highest. The smallest products come first: a sum
# loses bits of what it holds already, which is little until the last of them.
_PRODUCTS = ((0, 2), (2, 0), (1, 1), (0, 1), (1, 0), (0, 0))
_LEFT, _RIGHT = (sum(pair[side] << 2 * n for n, pair in enumerate(_PRODUCTS)) for side in (0, 1))


class Step(NamedTuple):
    """What a stage has of a sum.

    Attributes:
      at: step along the summed dimension.
      left, right: part of the left and of the right operand.
    """

    at: Any
    left: Any
    right: Any


def num_parts(dtype: Any) -> int:
    """Parts that `split` makes of values."""
    return 1 if dtype == jnp.bfloat16 else 3


def part_bytes(itemsize: int) -> int:
    """Bytes of a value's parts, of the value's own bytes."""
    return 2 if itemsize == 2 else 6


def num_products(parts: int) -> int:
    """Products of parts that stand for one product of values."""
    return 1 if parts == 1 else len(_PRODUCTS)


def step_of(step: Any, num_steps: Any, parts: int) -> Step:
    """What step number `step` has of a sum that takes `num_steps` for each product of parts."""
    if parts == 1:
        return Step(step, 0, 0)
    product = lax.div(step, jnp.int32(num_steps))
    left, right = ((jnp.int32(table) >> 2 * product) & 3 for table in (_LEFT, _RIGHT))
    return Step(step - product * num_steps, left, right)


def split(values: jax.Array) -> jax.Array:
    """bf16 parts of f32 values side by side along the second axis, the highest first.

    They add up to the value from 2^-103 on, where its lowest bit is still a normal number; the
    parts of infinity do not. Values in bf16 stay as they are.
    """
    if values.dtype == jnp.bfloat16:
        return values
    parts = []
    for _ in range(num_parts(values.dtype)):
        # Not a cast and back, which XLA may leave out, as it holds more precision to do no harm.
        part = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        values -= part
    return jnp.concatenate(parts, axis=1)
