"""Evaluation by full ranking: every user's held-out item among all items, history left out."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxrec.data import EvalSet, eval_batches
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.ops.metrics import ranking_metrics, target_ranks
from jaxrec.typing import PyTree

type RankFn = Callable[[PyTree, JaggedBatch, jax.Array | np.ndarray], jax.Array]


def make_rank_fn(model: nnx.Module) -> RankFn:
    """Jitted (params, batch, history_ids) → the rank of every target."""
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def rank(params: PyTree, batch: JaggedBatch, history_ids: jax.Array) -> jax.Array:
        module: Any = nnx.merge(graphdef, params, rest)
        hidden = module.encode(batch)[batch.target_positions]
        return target_ranks(hidden, module.item_embeddings(), batch.target_ids, history_ids)

    return rank


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
    """The rank of every user's target, in the order of the evaluation set."""
    num_users = len(eval_set.targets)
    ranks = np.zeros(num_users, np.int32)
    lengths = np.minimum(eval_set.histories.lengths, max_len)
    budget = int(max(lengths.max(initial=1), 1.25 * batch_size * lengths.mean()))
    batches = eval_batches(eval_set, max_len=max_len, batch_size=batch_size, token_budget=budget)
    pending = []
    for batch, users in batches:
        history = history_matrix(eval_set, users)
        pending.append((users, rank_fn(params, batch, history)))
        if progress is not None:
            progress(min(num_users, len(pending) * batch_size), num_users)
    for users, device_ranks in pending:
        real = users >= 0
        ranks[users[real]] = np.asarray(device_ranks)[real]
    return ranks


def history_matrix(eval_set: EvalSet, users: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B L"]:
    """Whole histories as rows padded with 0; L is one width for the whole evaluation set."""
    width = int(eval_set.histories.lengths.max(initial=1))
    rows = np.zeros((len(users), width), np.int32)
    for row, user in enumerate(users):
        if user >= 0:
            items = eval_set.histories.sequence(int(user))
            rows[row, : len(items)] = items
    return rows


def popularity_ranks(
    counts: Int[np.ndarray, "V"], eval_set: EvalSet, *, batch_size: int = 256
) -> Int[np.ndarray, "U"]:
    """Ranks of the baseline that recommends everyone the most frequent items.

    Same protocol as `user_ranks`; items seen equally often are ordered by their number.
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
