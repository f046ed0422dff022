"""f32 products on tensor cores that multiply bf16: values as sums of bf16 parts.

An f32 value has 24 significant bits and a bf16 value eight, so that three parts hold it exactly.
Of the nine products of two values' parts the three smallest are left out: together at most 2^-23 of
the whole, as much as f32 itself rounds.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PRODUCTS = ((0, 2), (2, 0), (1, 1), (0, 1), (1, 0), (0, 0))
"""Parts of the left and the right operand, 0 the highest.

The smallest products come first: a sum loses bits of what it holds already, which is little until
the last of them.
"""

# Two bits a part: what a kernel can look up without memory.
_LEFT, _RIGHT = (sum(pair[side] << 2 * n for n, pair in enumerate(PRODUCTS)) for side in (0, 1))


def nth_product(n: Any) -> tuple[Any, Any]:
    """`PRODUCTS[n]`, of an index that is computed."""
    left, right = ((jnp.int32(table) >> 2 * n) & 3 for table in (_LEFT, _RIGHT))
    return left, right


def num_parts(dtype: Any) -> int:
    """Parts that `split` makes of values."""
    return 1 if dtype == jnp.bfloat16 else 3


def split(values: jax.Array) -> list[jax.Array]:
    """bf16 parts of f32 values, the highest first.

    They add up to the value from 2^-103 on, where its lowest bit is still a normal number; the
    parts of infinity do not. Values in bf16 stay as they are.
    """
    if values.dtype == jnp.bfloat16:
        return [values]
    parts = []
    for _ in range(num_parts(values.dtype)):
        # Not a cast and back, which XLA may leave out, as it holds more precision to do no harm.
        part = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        values -= part
    return parts
