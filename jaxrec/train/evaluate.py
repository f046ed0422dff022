"""Evaluation by full ranking: every user's held-out item among all items, history left out."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxrec.data import EvalSet, eval_batches
from jaxrec.functional import split_params
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.ops.metrics import candidate_scores, ranking_metrics, reranked, target_ranks
from jaxrec.typing import PyTree

MAX_IN_FLIGHT = 8  # batches dispatched before the first result is fetched: bounds the memory

type RankFn = Callable[[PyTree, JaggedBatch, jax.Array | np.ndarray], jax.Array]


def make_rank_fn(model: nnx.Module) -> RankFn:
    """Jitted (params, batch, history_ids) → the rank of every target."""
    rebuild, _ = split_params(model)

    @jax.jit
    def rank(params: PyTree, batch: JaggedBatch, history_ids: jax.Array) -> jax.Array:
        module: Any = rebuild(params)
        hidden = module.encode(batch)[batch.target_positions]
        targets = jnp.asarray(batch.target_ids)
        return target_ranks(hidden, module.item_embeddings(), targets, history_ids)

    return rank


def make_rerank_fn(model: nnx.Module, *, num_candidates: int, block: int = 32) -> RankFn:
    """As `make_rank_fn`, with the best `num_candidates` by dot product re-ranked by the over-arch.

    A target that is not among the candidates keeps its rank by dot product.

    Args:
      model: a `TwoStage` model, or one with `overarch` besides `encode` and `item_embeddings`.
      num_candidates: K0; all items at most. Users' histories are no candidates.
      block: users scored at a time: memory is block·K0 rows of the over-arch's components.
    """
    rebuild, _ = split_params(model)

    @jax.jit
    def rank(params: PyTree, batch: JaggedBatch, history_ids: jax.Array) -> jax.Array:
        module: Any = rebuild(params)
        hidden = module.encode(batch)[batch.target_positions]
        table, targets = module.item_embeddings(), jnp.asarray(batch.target_ids)
        by_dot = target_ranks(hidden, table, targets, history_ids)
        components = module.overarch.item_components(table)
        k = min(num_candidates, table.shape[0] - 1)

        def one_block(rows):
            query, target, history, rank = rows
            scores = candidate_scores(query, table, target, history)
            ids = jax.lax.top_k(scores, k)[1]
            valid = jnp.take_along_axis(scores, ids, axis=1) > -jnp.inf
            chosen = jax.tree.map(lambda column: column[ids], components)
            return reranked(module.overarch(query, chosen, valid), ids, target, rank)

        rows = (hidden, targets, jnp.asarray(history_ids), by_dot)
        return _in_blocks(one_block, rows, block)

    return rank


def _in_blocks(function: Callable[[Any], jax.Array], rows: Any, block: int) -> jax.Array:
    """function(rows), with so many rows at a time; filled up with zeros."""
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    num_blocks = -(-num_rows // block)

    def split(x):
        padding = [(0, num_blocks * block - num_rows)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(num_blocks, block, *x.shape[1:])

    return jax.lax.map(function, jax.tree.map(split, rows)).reshape(-1)[:num_rows]


def evaluate_ranking(
    rank_fn: RankFn,
    params: PyTree,
    eval_set: EvalSet,
    *,
    max_len: int,
    batch_size: int = 256,
    cutoffs: Sequence[int] = (5, 10, 20),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """HR@k, NDCG@k and MRR over all users of `eval_set`.

    Args:
      rank_fn: from `make_rank_fn`.
      max_len: the most events of a history that the model sees; all of them are left out.
      progress: called with (users ranked, users).

    Raises:
      ValueError: the evaluation set is empty.

    Cost: 2·U·V·D FLOPs for U users, and their forward pass.
    """
    ranks = user_ranks(
        rank_fn, params, eval_set, max_len=max_len, batch_size=batch_size, progress=progress
    )
    return ranking_metrics(ranks, cutoffs)


def user_ranks(
    rank_fn: RankFn,
    params: PyTree,
    eval_set: EvalSet,
    *,
    max_len: int,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Int[np.ndarray, "U"]:
    """The rank of every user's target from 0, in the order of the evaluation set."""
    num_users = len(eval_set)
    ranks = np.zeros(num_users, np.int32)
    if not num_users:
        return ranks
    lengths = np.minimum(eval_set.histories.lengths, max_len)
    budget = int(max(lengths.max(initial=1), 1.25 * batch_size * lengths.mean()))
    batches = eval_batches(eval_set, max_len=max_len, batch_size=batch_size, token_budget=budget)
    in_flight: deque[tuple[np.ndarray, jax.Array]] = deque()

    def fetch_until(left: int) -> None:
        while len(in_flight) > left:
            users, device_ranks = in_flight.popleft()
            real = users >= 0
            ranks[users[real]] = np.asarray(device_ranks)[real]
            if progress is not None:
                progress(int(users.max()) + 1, num_users)

    for batch, users in batches:
        in_flight.append((users, rank_fn(params, batch, history_matrix(eval_set, users))))
        fetch_until(MAX_IN_FLIGHT)
    fetch_until(0)
    return ranks


def history_matrix(eval_set: EvalSet, users: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B L"]:
    """Whole histories as rows padded with 0; L is one width for the whole evaluation set.

    Args:
      users: rows of `eval_set`; -1 gives an empty history.
    """
    histories = eval_set.histories
    width = int(histories.lengths.max(initial=1))
    lengths = np.where(users >= 0, histories.lengths[users], 0)
    rows = np.zeros((len(users), width), np.int32)
    rows[np.arange(width) < lengths[:, None]] = histories.take(users, lengths).item_ids
    return rows


def popularity_ranks(counts: Int[np.ndarray, "V"], eval_set: EvalSet) -> Int[np.ndarray, "U"]:
    """Ranks of the baseline that recommends everyone the most frequent items.

    Histories are left out as in `user_ranks`; items seen equally often are ordered by their
    number.

    Args:
      counts: how often each item occurs in the training data; row 0 is padding.
    """
    order = np.lexsort((np.arange(len(counts)), -np.asarray(counts)))
    place = np.empty(len(counts), np.int64)
    place[order[order != 0]] = np.arange(len(counts) - 1)
    ranks = np.zeros(len(eval_set.targets), np.int32)
    for user, target in enumerate(eval_set.targets):
        seen = np.unique(eval_set.histories.sequence(user))
        seen = seen[(seen != target) & (seen != 0)]
        ranks[user] = place[target] - (place[seen] < place[target]).sum()
    return ranks
