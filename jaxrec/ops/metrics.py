"""Ranking metrics over the whole catalogue.

Protocol: every item but the padding row and the user's history is a candidate; the target stays
one even if it also occurs in the history. A target that ties with another item ranks behind it,
so a constant scorer earns nothing, and a score that is not a number ranks before every target, so
a broken model earns nothing either.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrec.typing import PADDING_ID


def target_ranks(
    hidden: Float[jax.Array, "B D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "B"],
    history_ids: Int[jax.Array, "B L"] | None = None,
    *,
    item_chunk: int = 16384,
) -> Int[jax.Array, "B"]:
    """How many candidates score at least as high as the target: 0 is the best rank.

    Scores that differ by no more than the rounding of a dot product tie: two equal items need not
    get the same last bit from a matmul.

    Args:
      history_ids: items to leave out, padded with 0; None leaves none out.
      item_chunk: candidates scored at a time; memory is B·item_chunk scores.

    Raises:
      ValueError: item_chunk < 1.

    Cost: 2·B·V·D FLOPs, in full f32 on every device.
    """
    if item_chunk < 1:
        raise ValueError(f"item_chunk must be at least 1, got {item_chunk}")
    num_items, width = table.shape
    chunk = min(item_chunk, num_items)
    num_chunks = -(-num_items // chunk)
    chunks = jnp.pad(table, ((0, num_chunks * chunk - num_items), (0, 0)))

    def dot(formula, *operands):
        return jnp.einsum(
            formula,
            *operands,
            preferred_element_type=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
        )

    target_rows = table[target_ids]
    rounding = width**0.5 * jnp.finfo(jnp.float32).eps
    target = dot("bd,bd->b", hidden, target_rows)
    target -= rounding * dot("bd,bd->b", jnp.abs(hidden), jnp.abs(target_rows))

    def count(total, chunk_and_start):
        rows, start = chunk_and_start
        scores = dot("bd,cd->bc", hidden, rows)
        ids = start + jnp.arange(chunk)
        left_out = (ids == PADDING_ID) | (ids >= num_items) | (ids == target_ids[:, None])
        if history_ids is not None:
            left_out |= _contains(history_ids - start, chunk)
        ahead = ~(scores < target[:, None])  # true of NaN, unlike scores >= target
        return total + (ahead & ~left_out).sum(axis=1), None

    starts = jnp.arange(num_chunks) * chunk
    init = jnp.zeros(hidden.shape[0], jnp.int32)
    return jax.lax.scan(count, init, (chunks.reshape(num_chunks, chunk, width), starts))[0]


def _contains(ids: jax.Array, size: int) -> Bool[jax.Array, "B {size}"]:
    """Which of 0 … size-1 each row lists; entries outside are passed over."""
    rows = jnp.arange(ids.shape[0])[:, None]
    columns = jnp.where(ids >= 0, ids, size)
    return jnp.zeros((ids.shape[0], size), bool).at[rows, columns].set(True, mode="drop")


def candidate_scores(
    hidden: Float[jax.Array, "B D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "B"],
    history_ids: Int[jax.Array, "B L"],
) -> Float[jax.Array, "B V"]:
    """Dot products, -inf for what the protocol leaves out: padding and the history (see above)."""
    scores = jnp.einsum("bd,vd->bv", hidden, table, preferred_element_type=jnp.float32)
    left_out = _contains(history_ids, table.shape[0])
    left_out &= jnp.arange(table.shape[0]) != target_ids[:, None]
    return jnp.where(left_out.at[:, PADDING_ID].set(True), -jnp.inf, scores)


def reranked(
    scores: Float[jax.Array, "B K0"],
    candidate_ids: Int[jax.Array, "B K0"],
    target_ids: Int[jax.Array, "B"],
    ranks: Int[jax.Array, "B"],
) -> Int[jax.Array, "B"]:
    """The targets' ranks once the candidates are ordered by `scores`.

    Ties rank before the target and so does NaN, as everywhere here. A target that is no candidate
    keeps its place in `ranks`.

    Args:
      scores: -inf where there is no candidate.
    """
    is_target = candidate_ids == target_ids[:, None]
    target = jnp.max(jnp.where(is_target, scores, -jnp.inf), axis=1, keepdims=True)
    ahead = ~(scores < target) & ~is_target & ~jnp.isneginf(scores)
    return jnp.where(is_target.any(axis=1), ahead.sum(axis=1), ranks).astype(jnp.int32)


def ranking_metrics(
    ranks: Int[np.ndarray | jax.Array, "B"], cutoffs: Sequence[int] = (5, 10, 20)
) -> dict[str, float]:
    """HR@k, NDCG@k (one relevant item each) and MRR, averaged over the ranks."""
    ranks = np.asarray(ranks)
    if ranks.size == 0:
        raise ValueError("no ranks to average: the evaluation set is empty")
    gains = 1 / np.log2(ranks + 2.0)
    metrics = {}
    for k in cutoffs:
        metrics[f"hr@{k}"] = float((ranks < k).mean())
        metrics[f"ndcg@{k}"] = float(np.where(ranks < k, gains, 0).mean())
    metrics["mrr"] = float((1 / (ranks + 1.0)).mean())
    return metrics
