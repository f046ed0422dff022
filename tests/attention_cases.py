"""Packed sequences for the tests of both attentions, and what their gradients must equal."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

MAX_LEN = 65  # blocks of 64 slots: a sequence may reach into three of them
NUM_TOKENS = 5 * MAX_LEN
LENGTHS = st.lists(
    st.sampled_from([0, 1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65]), min_size=5, max_size=5
)

UNSOUND_OFFSETS = [  # of four token slots and sequences of three, and what is said of them
    ([1, 4], "begin at 1; expected 0"),
    ([0, 3, 2, 4], "decrease from 3 to 2 at number 2"),
    ([0, 2, 5], "end at 5, but there are 4 token slots"),
    ([0, 4], "sequence 0 has 4 tokens, more than max_len=3; raise max_len"),
]


def offsets_of(lengths) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def qkv(seed: int, num_tokens: int, heads: int = 2, qk_width: int = 8, v_width: int = 12) -> Any:
    rng = np.random.default_rng(seed)
    widths = (qk_width, qk_width, v_width)
    return [rng.normal(size=(num_tokens, heads, width)).astype(np.float32) for width in widths]


def on_device(*arrays: Any) -> Any:
    return [jnp.asarray(array) for array in arrays]


def gradients64(function: Callable, *args: np.ndarray) -> list[np.ndarray]:
    """Gradients of the weighted sum of a dense formula's output, all in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in args]
        gradient = jax.grad(lambda *xs: weighted_sum(function(*xs)), argnums=range(len(args)))
        grads = jax.jit(gradient)(*wide)
        return [np.asarray(grad) for grad in grads]


def weighted_sum(out: jax.Array) -> jax.Array:
    """A scalar whose gradient by `out` is different for every element."""
    return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)).sum()


def assert_near(got: Any, want: np.ndarray, tolerance: float) -> None:
    """Within a share of the largest value."""
    got = np.asarray(got).astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max(initial=0))


def largest_array(compiled: jax.stages.Compiled) -> int:
    """Elements of the largest array in a compiled program."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|u32|pred)\[([\d,]+)\]", compiled.as_text() or "")
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)
