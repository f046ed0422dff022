"""Ranks of pairs among those of their expert, counted on Hopper's tensor cores.

A program takes a contiguous share of the pairs, 64 at a time. With M [64, E] the pairs' experts as
rows of one 1 each, and B strictly lower triangular, the product B·M counts what the block holds
before each pair. It is added to an accumulator whose rows all hold what the share held before, so
that row i then holds the rank of pair i in the column of its expert; the product of the other
triangle with M makes all rows alike again. Counts are f32 and exact below 2^24.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

PROGRAMS = 264
"""Thread blocks: two for each multiprocessor of an H200, one to wait for memory at a time."""

_BLOCK = 64
_LAYOUT = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row
_PIECE = 8  # columns that a thread's registers hold a row of without a gap


def rank_pairs(
    ids: Int32[Array, "N"], *, num_experts: int, programs: int = PROGRAMS
) -> tuple[Int32[Array, "N"], Int32[Array, "G E"], int]:
    """Ranks of pairs in their share, and how many of each expert every share has.

    Args:
      ids: the pairs' experts; others than 0 … E - 1 are nobody's, and their ranks mean nothing.
      num_experts: E, up to 256.
      programs: shares are this many, or fewer for few pairs.

    Returns:
      (ranks, counts, pairs of a share: pair n is in share n // that).
    """
    columns = max(16, 1 << (num_experts - 1).bit_length())
    num_blocks = -(-ids.size // _BLOCK)
    share = -(-num_blocks // programs)
    programs = -(-num_blocks // share)
    padded = jnp.pad(ids, (0, num_blocks * _BLOCK - ids.size), constant_values=-1)
    ranks, counts = plgpu.kernel(
        functools.partial(_kernel, share=share),
        out_type=[
            jax.ShapeDtypeStruct(padded.shape, jnp.int32),
            jax.ShapeDtypeStruct((programs, columns), jnp.int32),
        ],
        grid=(programs,),
        grid_names=("program",),
        scratch_types=[_operand(_BLOCK, columns) for _ in range(2)] + [_operand(columns, columns)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="moe_dispatch",
    )(padded)
    return ranks[: ids.size], counts[:, :num_experts], share * _BLOCK


def _operand(width: int, columns: int):
    """Shared memory [64, width] for wgmma; both operands of a product are swizzled alike."""
    line = min(64, columns)
    return plgpu.SMEM(
        (_BLOCK, width),
        jnp.bfloat16,
        transforms=(
            plgpu.TilingTransform((8, line)),  # pyright: ignore[reportAbstractUsage]
            plgpu.SwizzleTransform(2 * line),  # pyright: ignore[reportAbstractUsage]
        ),
    )


def _kernel(ids, ranks, counts, earlier, others, members, *, share):
    """Goes through a program's blocks; the next block's ids load during the products."""
    columns, num_blocks = members.shape[1], ids.shape[0] // _BLOCK
    program = lax.axis_index("program")
    first = program * share
    row, column = (_iota(_BLOCK, axis) for axis in (0, 1))
    earlier[...] = jnp.where(column < row, 1.0, 0.0).astype(members.dtype)
    others[...] = jnp.where(column < row, 0.0, 1.0).astype(members.dtype)

    def block(n):
        return pl.ds(pl.multiple_of(jnp.minimum(n, num_blocks - 1) * _BLOCK, _BLOCK), _BLOCK)

    def load(n):
        return plgpu.load(ids.at[block(n)], layout=_ROWS, optimized=False)

    def count(before):
        def step(n, own):
            following = load(n + 1)
            members[...] = _one_hot(own, columns)
            plgpu.commit_smem()
            plgpu.wgmma(before, earlier, members)
            ranks[block(n)] = _take(before[...], own)
            plgpu.wgmma(before, others, members)
            plgpu.wgmma_wait(0)  # the members' memory is written next
            return following

        lax.fori_loop(first, jnp.minimum(first + share, num_blocks), step, load(first))
        return before[...]

    totals = pl.run_scoped(count, plgpu.WGMMAAccumulatorRef((_BLOCK, columns), jnp.float32))
    counts[program] = jnp.max(totals, axis=0).astype(jnp.int32)


def _iota(width: int, axis: int = 1) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (_BLOCK, width), axis, layout=_LAYOUT)


def _across(values: jax.Array, width: int) -> jax.Array:
    return lax.broadcast_in_dim(values, (_BLOCK, width), (0,))


def _one_hot(ids: Int32[Array, "64"], columns: int) -> BFloat16[Array, "64 C"]:
    """A 1 in the column of each row's id: found in a piece, then put where the piece belongs."""
    own = _across(ids & _PIECE - 1, _PIECE) == _iota(_PIECE)
    piece = jnp.where(own, 1.0, 0.0).astype(jnp.bfloat16)  # packed two to a register from here on
    place = _across(ids >> _PIECE.bit_length() - 1, _PIECE)
    return jnp.concatenate(
        [jnp.where(place == n, piece, 0) for n in range(columns // _PIECE)], axis=1
    )


def _take(values: Float32[Array, "64 C"], ids: Int32[Array, "64"]) -> Int32[Array, "64"]:
    """Each row's value in the column of its id: halves are chosen until a piece is left."""
    width = values.shape[1]
    while width > _PIECE:
        width //= 2
        upper = (_across(ids, width) & width) != 0
        values = jnp.where(upper, values[:, width:], values[:, :width])
    own = _across(ids & _PIECE - 1, _PIECE) == _iota(_PIECE)
    return jnp.sum(jnp.where(own, values, 0), axis=1).astype(jnp.int32)
