"""Sizes of the HSTU attention kernels, and what they cannot do."""

from dataclasses import dataclass

import jax.numpy as jnp

WIDTH_MULTIPLE = 32
MAX_WIDTH = 256
MAX_F32_WIDTHS = 256  # of q and v together


@dataclass(frozen=True)
class HstuConfig:
    """Sizes that change speed, never what is computed.

    Attributes:
      programs: thread blocks of each kernel; 132 is one for each multiprocessor of an H200.
      aligned: promises that every sequence starts at a multiple of 8 slots, and that the slots
        behind the last one hold finite values. The kernels then read and write q, k, v and out
        where they are instead of in copies, but for what they read in f32. A sequence that starts
        elsewhere is an error; inside `jax.jit` the kernels then give NaN.
    """

    programs: int = 132
    aligned: bool = False

    def __post_init__(self):
        if self.programs < 1:
            raise ValueError(f"HstuConfig.programs is {self.programs}; expected at least 1")


def kernel_problem(q, k, v) -> str | None:
    """What keeps the kernels from these arguments, whose last axis is the heads' width, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q is {q.dtype}; the kernels multiply bfloat16 and float32"
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            return f"q is {q.dtype} and {name} is {x.dtype}; the kernels need one dtype"
    widths = q.shape[-1], v.shape[-1]
    for name, width in zip("qv", widths, strict=True):
        if width % WIDTH_MULTIPLE or not 0 < width <= MAX_WIDTH:
            return (
                f"the heads of {name} are {width} wide; the kernels need a multiple of "
                f"{WIDTH_MULTIPLE} up to {MAX_WIDTH}"
            )
    if q.dtype == jnp.float32 and sum(widths) > MAX_F32_WIDTHS:
        return (
            f"the heads of q and v are {widths[0]} and {widths[1]} wide; in float32 the kernels "
            f"have shared memory for {MAX_F32_WIDTHS} together"
        )
    return None
