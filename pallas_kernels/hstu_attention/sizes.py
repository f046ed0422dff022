"""Static sizes of the HSTU kernels: what they hold in shared memory, and how much of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hstu_attention.tiles import TILE, WORK, Mask

_SHARED_BYTES = 224 * 1024  # of 227 KiB; barriers and reductions take the rest
_SHARED_MULTIPLE = 1024  # where the compiler lets a buffer start
_MAX_STAGES = 4
_WIDE = 128  # columns of sums, from which on registers are short
_F32_LINE = 16  # columns of f32 results that leave the registers at once


def swizzled(shape: Sequence[int], line: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory as TMA and wgmma want it, in lines of that many columns (32 … 128 bytes)."""
    return plgpu.SMEM(
        tuple(shape),
        dtype,
        transforms=(
            plgpu.TilingTransform((8, line)),  # pyright: ignore[reportAbstractUsage]
            plgpu.SwizzleTransform(  # pyright: ignore[reportAbstractUsage]
                line * jnp.dtype(dtype).itemsize
            ),
        ),
    )


@dataclass(frozen=True)
class Buffer:
    """One operand in shared memory; matrices are bf16 and vectors i32 or f32."""

    shape: tuple[int, ...]
    dtype: Any = jnp.bfloat16
    copies: int = 1

    def num_bytes(self, slots: int) -> int:
        """Of `slots` blocks."""
        own = slots * math.prod(self.shape) * jnp.dtype(self.dtype).itemsize
        return -(-own // _SHARED_MULTIPLE) * _SHARED_MULTIPLE

    def memory(self, slots: int, line: int) -> Any:
        """`slots` blocks."""
        if self.dtype == jnp.bfloat16:
            return swizzled((slots, *self.shape), line)
        return plgpu.SMEM((slots, *self.shape), self.dtype)


def matrix(rows: int, width: int, parts: int) -> Buffer:
    """Of a matrix, or of its parts one behind the other."""
    return Buffer((rows, width) if parts == 1 else (parts, rows, width), copies=parts)


def line_of(buffers: Sequence[Buffer]) -> int:
    """Columns of a line of shared memory, of which all operands of a product have the same."""
    matrices = [buffer.shape for buffer in buffers if buffer.shape[1:]]
    return min(64 if shape[-1] % 64 == 0 else 32 for shape in matrices)


def most_stages(streamed: Sequence[Buffer], other_bytes: int) -> int:
    """Stages of a ring that fit beside `other_bytes`; 0 if not even one does."""
    for stages in range(_MAX_STAGES, 0, -1):
        if sum(buffer.num_bytes(stages) for buffer in streamed) + other_bytes <= _SHARED_BYTES:
            return stages
    return 0


def copies(buffers: Sequence[Buffer]) -> int:
    """Arrivals that fill a slot of these."""
    return sum(buffer.copies for buffer in buffers)


@dataclass(frozen=True)
class Walk:
    """Static sizes of one kernel.

    Attributes:
      name: of the kernel.
      heads: H; work w is head w mod H of its rows.
      programs: thread blocks.
      mask: which tiles count.
      by_keys: works are keys that meet tiles of queries, not queries that meet tiles of keys.
      resident: blocks that a work keeps.
      streamed: blocks of a stage of the ring.
      rows: of a work, `TILE` for each warpgroup that computes.
      parts: of each operand (`operands.split`).
      weights: matrices [64, 64] that a warpgroup hands to the tensor cores through shared memory.
      sums: columns that a warpgroup sums up in registers.
      cached: what works meet stands in rows of its own; a fifth field tells where they start.
    """

    name: str
    heads: int
    programs: int
    mask: Mask
    by_keys: bool
    resident: tuple[Buffer, ...]
    streamed: tuple[Buffer, ...]
    rows: int
    parts: int
    weights: int
    sums: int
    cached: bool = False

    @property
    def warpgroups(self) -> int:
        """That compute."""
        return self.rows // TILE

    @property
    def line(self) -> int:
        """Columns of a line of shared memory, of which all operands of a product have the same."""
        return line_of(self.resident + self.streamed)

    @property
    def is_tight(self) -> bool:
        """Whether sums, or values that stay in f32, leave few registers for anything else."""
        return self.sums > _WIDE or self.parts > 1

    @property
    def weight_memory(self) -> Any:
        """Of the weights, by warpgroup."""
        shape = matrix(TILE, TILE, self.parts).shape
        return swizzled((self.warpgroups, self.weights, *shape), self.line)

    @property
    def staging_memory(self) -> Any:
        """Of results on their way out; None where they leave through the weights' memory."""
        if self.parts > 1:
            return swizzled((self.warpgroups, TILE, _F32_LINE), _F32_LINE, jnp.float32)
        if self.line == TILE:
            return None
        return swizzled((self.warpgroups, TILE, self.line), self.line)

    def _shared_bytes(self, slots: int, stages: int) -> int:
        own = [self.weight_memory, self.staging_memory]
        return (
            sum(buffer.num_bytes(slots) for buffer in self.resident)
            + sum(buffer.num_bytes(stages) for buffer in self.streamed)
            + sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in own if x is not None)
        )

    @property
    def stages(self) -> int:
        """Of the ring: as many as fit beside one work's residents, at most four; 0 for too wide."""
        return most_stages(self.streamed, self._shared_bytes(1, 0))

    @property
    def slots(self) -> int:
        """Works whose residents fit: two where there is room, so that the next arrive early."""
        return 2 if self._shared_bytes(2, self.stages) <= _SHARED_BYTES else 1


def fitting(walk_of: Callable[[int], Walk]) -> Walk:
    """walk_of(rows of a work), for as many rows as fit shared memory."""
    for rows in (WORK, TILE):
        walk = walk_of(rows)
        if walk.stages:
            return walk
    raise ValueError(f"{walk.name}: heads this wide do not fit shared memory")
