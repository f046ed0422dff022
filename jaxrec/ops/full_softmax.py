"""Cross-entropy among all items of a catalogue, in memory that does not grow with it.

Logits exist one tile of rows × items at a time. Small catalogues make their gradients in the same
pass, so that nothing is computed twice; large ones keep the log-sum-exp of every row, and compute
their logits again for the gradient, tile by tile.

Letters: M rows, V items, D width.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from jaxrec.typing import PADDING_ID

NEVER = -1e30  # the score of what is no candidate; finite, so that no gradient becomes NaN
_FEWEST_ROWS = 64  # with all items at a time; fewer rows make thin products, so items are split too
_TILE_ROWS = 1024


def full_softmax_loss(
    hidden: Float[jax.Array, "M D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "M"],
    max_logits: int | None = None,
) -> Float[jax.Array, ""]:
    """Cross-entropy of the target among all items, without ever holding all logits.

        loss[m] = log Σ_v exp(h[m]·e[v]) - h[m]·e[target[m]],   v = 1 … V-1

    Args:
      hidden: bf16 or f32; logits and sums are f32.
      table: bf16 or f32; products are computed in the dtype of hidden.
      max_logits: logits held at once (static). None takes 2²² on a CPU, whose cache holds them, and
        2²⁶ elsewhere.

    Cost: 2·M·V·D FLOPs. With gradients 6·M·V·D, and f32 sums of the table's shape, up to
    max_logits / 64 items; beyond that 8·M·V·D and, besides results, some arrays of max_logits or
    M·D elements, whatever V. Sums are in a fixed order. Differentiable once, in reverse.
    """
    if max_logits is None:
        max_logits = 1 << (22 if jax.default_backend() == "cpu" else 26)
    return _loss(hidden, table, target_ids, max_logits)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loss(hidden, table, target_ids, max_logits: int) -> jax.Array:
    return _tiled_forward(hidden, table, target_ids, max_logits)[0]


def _forward(hidden, table, target_ids, max_logits):
    if table.shape[0] * _FEWEST_ROWS <= max_logits:
        loss, *gradients = _one_pass(hidden, table, target_ids, max_logits)
        return loss, tuple(gradients)
    loss, normaliser = _tiled_forward(hidden, table, target_ids, max_logits)
    return loss, (hidden, table, target_ids, normaliser)


def _backward(max_logits, kept, dloss):
    if len(kept) == 2:
        dhidden, dtable = kept
        return (dloss * dhidden).astype(dhidden.dtype), (dloss * dtable).astype(dtable.dtype), None
    hidden, table, target_ids, normaliser = kept
    gradients = _tiled_backward(hidden, table, target_ids, normaliser, dloss, max_logits)
    return *gradients, None


_loss.defvjp(_forward, _backward)


def _weights(target_ids: jax.Array) -> jax.Array:
    """Of every row in the mean over those that have a target; f32[M]."""
    real = target_ids != PADDING_ID
    return (real / jnp.maximum(real.sum(), 1)).astype(jnp.float32)


def _target_rows(hidden: jax.Array, table: jax.Array, target_ids: jax.Array) -> jax.Array:
    return table[target_ids].astype(hidden.dtype)


def _dot(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def in_chunks(x: jax.Array, num_chunks: int, size: int) -> jax.Array:
    """x cut along its first axis, zeros behind its end; [num_chunks, size, …]."""
    padding = [(0, num_chunks * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(num_chunks, size, *x.shape[1:])


# Small catalogues: chunks of rows against all items, with their gradients.


def _one_pass(
    hidden: jax.Array, table: jax.Array, target_ids: jax.Array, max_logits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss, and its gradients by hidden and table.

    The padding row is left out rather than masked, and the table's gradient summed transposed: a
    pass less over all logits, and products that need no transposed copies of them.
    """
    num_rows, num_items = hidden.shape[0], table.shape[0] - 1
    num_chunks = max(1, -(-num_rows // (max_logits // max(num_items, 1))))
    chunk = max(1, -(-num_rows // num_chunks))
    weight, items = _weights(target_ids), table[PADDING_ID + 1 :].astype(hidden.dtype)

    def one_chunk(carry, rows_and_weights):
        loss, dtable = carry
        h, weight = rows_and_weights
        logits = _dot("md,vd->mv", h, items)
        peak = logits.max(axis=1)
        exps = jnp.exp(logits - peak[:, None])
        total = exps.sum(axis=1)
        loss += (weight * (jnp.log(total) + peak)).sum()
        # The row factor goes to the small operands: one pass less over all logits.
        factor, exps = (weight / total)[:, None], exps.astype(h.dtype)
        dh = _dot("mv,vd->md", exps, items) * factor
        dtable += _dot("md,mv->dv", (h * factor).astype(h.dtype), exps)
        return (loss, dtable), dh

    init = (jnp.zeros((), jnp.float32), jnp.zeros(items.shape[::-1], jnp.float32))
    chunks = tuple(in_chunks(x, num_chunks, chunk) for x in (hidden, weight))
    (loss, dtable), dhidden = lax.scan(one_chunk, init, chunks)
    target_rows = _target_rows(hidden, table, target_ids)
    loss -= (weight * _dot("md,md->m", hidden, target_rows)).sum()
    dhidden = dhidden.reshape(-1, hidden.shape[1])[:num_rows] - weight[:, None] * target_rows
    # Behind a barrier: a transposition merged into the product would slow it down on a CPU.
    dtable = jnp.pad(lax.optimization_barrier(dtable).T, ((1, 0), (0, 0)))
    dtable = dtable.at[target_ids].add(-weight[:, None] * hidden)
    return loss, dhidden.astype(hidden.dtype), dtable.astype(table.dtype)


# Large catalogues: tiles of rows × items.


class _Tiles(NamedTuple):
    """How rows and items are cut: equal chunks, where the last one of items begins early.

    Items outside, rows inside: the table is read once a pass, the rows, which are few, often.
    """

    num_row_chunks: int
    rows: int
    num_item_chunks: int
    items: int

    @classmethod
    def of(cls, num_rows: int, num_items: int, max_logits: int) -> "_Tiles":
        row_chunks = max(1, -(-num_rows // min(_TILE_ROWS, max_logits)))
        rows = max(1, -(-num_rows // row_chunks))
        item_chunks = -(-num_items // max(1, max_logits // rows))
        return cls(row_chunks, rows, item_chunks, -(-num_items // item_chunks))

    def split_rows(self, x: jax.Array) -> jax.Array:
        return in_chunks(x, self.num_row_chunks, self.rows)

    def items_at(
        self, number: jax.Array, table: jax.Array, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(rows of the table in `dtype`, their first number, all numbers, which count here)."""
        start = jnp.minimum(number * self.items, table.shape[0] - self.items)
        ids = start + jnp.arange(self.items, dtype=jnp.int32)
        counts = (ids >= number * self.items) & (ids != PADDING_ID)
        return lax.dynamic_slice_in_dim(table, start, self.items).astype(dtype), start, ids, counts


def _tiled_forward(
    hidden: jax.Array, table: jax.Array, target_ids: jax.Array, max_logits: int
) -> tuple[jax.Array, jax.Array]:
    """The loss, and the log-sum-exp of every row."""
    num_rows = hidden.shape[0]
    tiles = _Tiles.of(num_rows, table.shape[0], max_logits)
    rows = tiles.split_rows(hidden)

    def one_item_chunk(sums, number):
        items, _, _, counts = tiles.items_at(number, table, hidden.dtype)

        def one_tile(_, row_chunk):
            h, peak, total = row_chunk
            logits = jnp.where(counts, _dot("md,vd->mv", h, items), NEVER)
            higher = jnp.maximum(peak, logits.max(axis=1))
            exps = jnp.exp(logits - higher[:, None]).sum(axis=1)
            return None, (higher, total * jnp.exp(peak - higher) + exps)

        return lax.scan(one_tile, None, (rows, *sums))[1], None

    shape = rows.shape[:2]
    init = (jnp.full(shape, NEVER, jnp.float32), jnp.zeros(shape, jnp.float32))
    numbers = jnp.arange(tiles.num_item_chunks, dtype=jnp.int32)
    (peak, total), _ = lax.scan(one_item_chunk, init, numbers)
    normaliser = (peak + jnp.log(total)).reshape(-1)[:num_rows]
    scores = _dot("md,md->m", hidden, _target_rows(hidden, table, target_ids))
    return (_weights(target_ids) * (normaliser - scores)).sum(), normaliser


def _tiled_backward(
    hidden: jax.Array,
    table: jax.Array,
    target_ids: jax.Array,
    normaliser: jax.Array,
    dloss: jax.Array,
    max_logits: int,
) -> tuple[jax.Array, jax.Array]:
    """Gradients by hidden and table; the latter is written once, chunk by chunk."""
    num_rows, width = hidden.shape
    tiles = _Tiles.of(num_rows, table.shape[0], max_logits)
    factor = (dloss * _weights(target_ids))[:, None]
    row_chunks = (hidden, (hidden * factor).astype(hidden.dtype), target_ids, normaliser)
    row_chunks = tuple(tiles.split_rows(x) for x in row_chunks)

    def one_item_chunk(carry, number):
        dhidden, dtable = carry
        items, start, ids, counts = tiles.items_at(number, table, hidden.dtype)

        def one_tile(ditems, row_chunk):
            (h, scaled, targets, normaliser), dh = row_chunk
            logits = jnp.where(counts, _dot("md,vd->mv", h, items), NEVER)
            is_target = counts & (ids == targets[:, None])
            share = (jnp.exp(logits - normaliser[:, None]) - is_target).astype(h.dtype)
            dh += _dot("mv,vd->md", share, items)
            return ditems + _dot("mv,md->vd", share, scaled), dh

        init = jnp.zeros((tiles.items, width), jnp.float32)
        ditems, dhidden = lax.scan(one_tile, init, (row_chunks, dhidden))
        # Rows that the chunk before has done already get nothing here.
        ditems += lax.dynamic_slice_in_dim(dtable, start, tiles.items)
        dtable = lax.dynamic_update_slice_in_dim(dtable, ditems.astype(table.dtype), start, 0)
        return (dhidden, dtable), None

    init = (jnp.zeros(row_chunks[0].shape, jnp.float32), jnp.zeros_like(table))
    numbers = jnp.arange(tiles.num_item_chunks, dtype=jnp.int32)
    (dhidden, dtable), _ = lax.scan(one_item_chunk, init, numbers)
    dhidden = dhidden.reshape(-1, width)[:num_rows] * factor
    return dhidden.astype(hidden.dtype), dtable
