"""Matrices in shared memory, multiplied in bf16 or, for f32, as three bf16 parts of each value."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _parts
from pallas_kernels._parts import PRODUCTS, nth_product


def compiler_params(parts: int) -> plgpu.CompilerParams:
    """Of a kernel whose operands have that many parts."""
    return plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        approx_math=parts == 1,  # its tanh is right to 2^-11 only
        # A reduction across warps is an error: all warpgroups would use the same scratch at once,
        # which the simulator does not see.
        reduction_scratch_bytes=0,
    )


def split(values: jax.Array) -> jax.Array:
    """Parts of rows [R, H, D] side by side: [R, H, 3·D] of f32, bf16 as it is."""
    parts = _parts.split(values)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


def copy_rows(
    copy: Callable[..., None], source: Any, rows: Any, head: Any, n: int, parts: int
) -> None:
    """Copies rows of a head, of an array that `split` made, to buffer n, a `matrix`."""
    if parts == 1:
        copy(source.at[rows, head], n)
        return
    width = source.shape[2] // parts
    for part in range(parts):
        copy(source.at[rows, head, pl.ds(part * width, width)], n, part)


def copier(buffers: Sequence[Any], slot: Any, barrier: Any) -> Callable[..., None]:
    """copy(source, n, *block): into a block of buffer n, and arrives when it is there."""

    def copy(source, n, *block):
        plgpu.copy_gmem_to_smem(source, buffers[n].at[(slot, *block)], barrier.at[slot])

    return copy


def unknown_zero(count: Any) -> Any:
    """Zero for any count, which the compiler cannot know.

    Addresses of operands that depend on it are computed in each step. Those that do not are kept in
    registers all along, two for each 16 columns of each operand: with wide heads, more than there
    are.
    """
    return lax.shift_right_arithmetic(count, jnp.int32(31))


class Operand(NamedTuple):
    """A matrix in shared memory.

    Attributes:
      block: reference to it, or to its parts one behind the other.
      parts: their number.
      transposed: whether products take it so.
    """

    block: Any
    parts: int
    transposed: bool = False

    @classmethod
    def of_rows(cls, block: Any, rows: Any, parts: int) -> "Operand":
        """Some rows of a block."""
        return cls(block.at[rows] if parts == 1 else block.at[:, rows], parts)

    @property
    def T(self) -> "Operand":  # noqa: N802 - as arrays have it
        """The matrix transposed."""
        return self._replace(transposed=not self.transposed)

    def part(self, n: Any) -> Any:
        """Reference to a part, 0 the highest."""
        own = self.block if self.parts == 1 else self.block.at[n]
        return own.T if self.transposed else own

    def put(self, values: Any) -> None:
        """Writes values, as bf16 or as the parts of f32."""
        for n in range(self.parts):
            part = values.astype(jnp.bfloat16)
            self.part(n)[...] = part
            if n < self.parts - 1:
                values -= part.astype(jnp.float32)


def multiply(accumulator: Any, left: Operand, right: Operand) -> None:
    """Issues products that add left · right to the accumulator."""
    if left.parts == 1:
        plgpu.wgmma(accumulator, left.part(0), right.part(0))
        return

    def product(n, _):
        a, b = nth_product(n)
        plgpu.wgmma(accumulator, left.part(a), right.part(b))

    # A loop that the compiler cannot unroll: addresses of all parts would fill the registers.
    count = len(PRODUCTS) + unknown_zero(lax.axis_index("warpgroup"))
    lax.fori_loop(0, count, product, None)
