"""Products whose f32 operands come in bf16 parts (`pallas_kernels._parts`), step by step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _parts
from pallas_kernels._parts import PRODUCTS, nth_product


class Step(NamedTuple):
    """What a stage has of a sum.

    Attributes:
      at: step along the summed dimension.
      left, right: part of the left and of the right operand.
    """

    at: Any
    left: Any
    right: Any


def split(values: jax.Array) -> jax.Array:
    """Parts of values (`_parts.split`) side by side along the second axis."""
    parts = _parts.split(values)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def part_bytes(itemsize: int) -> int:
    """Bytes of a value's parts, of the value's own bytes."""
    return 2 if itemsize == 2 else 6


def num_products(parts: int) -> int:
    """Products of parts that stand for one product of values."""
    return 1 if parts == 1 else len(PRODUCTS)


def step_of(step: Any, num_steps: Any, parts: int) -> Step:
    """What step number `step` has of a sum that takes `num_steps` for each product of parts."""
    if parts == 1:
        return Step(step, 0, 0)
    product = lax.div(step, jnp.int32(num_steps))
    return Step(step - product * num_steps, *nth_product(product))
