"""Top-k search among the items that pass a filter: nothing eligible is lost, nothing else found.

Letters: M filters, H queries that share each of them, Q = M·H queries.
"""

import functools
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jaxrec.retrieval.bloom_index import BloomIndex
from jaxrec.retrieval.ivf_index import IVFIndex, RowResult, as_queries, search_rows
from jaxrec.retrieval.masks import chosen_rows, rows_at
from jaxrec.retrieval.plan import FilterPlan
from jaxrec.retrieval.planner import (
    CostModel,
    SearchPlan,
    Strategy,
    eligible_by_list,
    is_small,
    make_plan,
    probe_counts,
)
from pallas_kernels import IVF_MAX_K

_ROUNDS = 3
_CHUNK = 1 << 10  # eligible rows gathered at a time, and four times as many for
_MANY_HEADS = 8  # queries that share them


@dataclass(frozen=True)
class SearchOptions:
    """What a search is asked for; see `ItemIndex.search`.

    Attributes:
      k: results a query.
      nprobe: lists to scan at least; None lets the recall curve decide.
      exact: the result must equal brute force.
      shares: the index's recall curve.
      costs: what the planner reckons with.
    """

    k: int
    nprobe: int | None
    exact: bool
    shares: tuple[tuple[float, float], ...]
    costs: CostModel


def search_eligible(
    ivf: IVFIndex,
    bloom: BloomIndex,
    plan: FilterPlan,
    queries: Float[Array, "M H D"],
    excluded: UInt32[Array, "M words"] | None,
    options: SearchOptions,
) -> RowResult:
    """The k best rows of each query that pass its filter and are not excluded; traceable.

    Up to three rounds, the later ones only where a query lacks results though items may remain, and
    only for these queries' results: as planned; all rows, without the false positives found so far;
    all rows with the exact mask. A small index goes through the last of them alone, in f32. Returns
    M·H queries.
    """
    if is_small(ivf):
        return _search_small(ivf, bloom, plan, queries, excluded, options.k)
    num_queries, k = queries.shape[0] * queries.shape[1], options.k
    words = ivf.live.shape[0]

    def one_round(state):
        number, mask, best, lacking = state
        found, still, wrong = _one_round(
            ivf, bloom, plan, queries, mask, options, all_rows=number > 0
        )
        best, lacking = _select(lacking, found, best), lacking & still

        def next_mask():
            return lax.cond(
                number == 0,
                lambda: mask & ~chosen_rows(wrong, words),
                lambda: _allowed(ivf, bloom, bloom.exact_mask(plan), excluded),
            )

        return number + 1, lax.cond(lacking.any(), next_mask, lambda: mask), best, lacking

    def goes_on(state):
        return (state[0] < _ROUNDS) & state[3].any()

    mask = _allowed(ivf, bloom, bloom.masks(plan).possibly, excluded)
    nothing = RowResult(
        jnp.full((num_queries, k), -jnp.inf),
        jnp.full((num_queries, k), -1, jnp.int32),
        jnp.zeros(num_queries, bool),
    )
    state = (jnp.int32(0), mask, nothing, jnp.ones(num_queries, bool))
    return lax.while_loop(goes_on, one_round, state)[2]


def _search_small(ivf, bloom, plan, queries, excluded, k: int) -> RowResult:
    num_masks, heads, width = queries.shape
    mask = _allowed(ivf, bloom, bloom.exact_mask(plan), excluded)
    return search_rows(
        ivf, queries.reshape(-1, width), mask, mask_of_query=_mask_of_query(num_masks, heads),
        k=k, nprobe=ivf.nlist, precision="float",
    )  # fmt: skip


def _mask_of_query(num_masks: int, heads: int) -> Int32[Array, "Q"]:
    return jnp.repeat(jnp.arange(num_masks, dtype=jnp.int32), heads)


def plan_of(
    ivf: IVFIndex,
    bloom: BloomIndex,
    plan: FilterPlan,
    queries: Float[Array, "M H D"],
    excluded: UInt32[Array, "M words"] | None,
    options: SearchOptions,
) -> SearchPlan:
    """What the first round of `search_eligible` does for each of the M·H queries."""
    mask = _allowed(ivf, bloom, bloom.masks(plan).possibly, excluded)
    heads, eligible = queries.shape[1], _count(mask)
    strategy, share = _make_plan(ivf, eligible, heads, options)
    probes = _probes(ivf, queries, mask, share, options)
    strategy, eligible = (jnp.repeat(x, heads) for x in (strategy, eligible))
    return SearchPlan(strategy, eligible, jnp.where(strategy == Strategy.PROBE, probes, 0))


def _allowed(ivf, bloom, mask, excluded) -> UInt32[Array, "M words"]:
    mask = mask & bloom.live & ivf.live
    return mask if excluded is None else mask & ~excluded


def _count(mask: UInt32[Array, "M words"]) -> Int32[Array, "M"]:
    return jnp.sum(lax.population_count(mask), axis=1, dtype=jnp.int32)


def _make_plan(ivf, eligible, heads: int, options: SearchOptions, all_rows=False):
    return make_plan(
        ivf, eligible, heads=heads, k=options.k, nprobe=options.nprobe, shares=options.shares,
        all_rows=all_rows | options.exact, costs=options.costs,
    )  # fmt: skip


def _probes(ivf, queries, mask, share, options: SearchOptions) -> Int32[Array, "Q"]:
    num_queries, heads = queries.shape[0] * queries.shape[1], queries.shape[1]
    if options.nprobe is not None:
        return jnp.full(num_queries, options.nprobe, jnp.int32)
    in_lists = jnp.repeat(eligible_by_list(ivf, mask), heads, axis=0)
    return probe_counts(ivf, queries.reshape(num_queries, -1), in_lists, jnp.repeat(share, heads))


def _one_round(ivf, bloom, plan, queries, mask, options, *, all_rows):
    """(the k best that pass, queries to search on, rows found that do not pass; -1 elsewhere)."""
    num_masks, heads, k = *queries.shape[:2], options.k
    # Room for false positives, which are few: where they are more, the next round follows.
    fetch = max(k, min(k + k // 8 + 16, ivf.num_items, IVF_MAX_K))
    eligible = _count(mask)
    strategy, share = _make_plan(ivf, eligible, heads, options, all_rows)
    few = strategy == Strategy.COMPACT
    best = search_compact(ivf, bloom, plan, queries, mask, jnp.where(few, eligible, 0), k)
    # A compacted search has seen and verified all that is eligible.
    complete = jnp.zeros(num_masks * heads, bool), jnp.full((num_masks, heads * fetch), -1)
    few = jnp.repeat(few, heads)

    def scan_others():
        scan = functools.partial(
            search_rows, ivf, queries.reshape(len(few), -1), mask,
            mask_of_query=_mask_of_query(num_masks, heads),
            k=fetch, nprobe=ivf.nlist, precision="float" if options.exact else "rescored",
        )  # fmt: skip

        def probe():
            return scan(probes=jnp.where(few, 0, _probes(ivf, queries, mask, share, options)))

        found = lax.cond(strategy[0] == Strategy.SCAN, scan, probe)
        found, lacking, wrong = _verified(bloom, plan, found, k, jnp.repeat(eligible, heads))
        return _select(few, best, found), lacking & ~few, wrong

    return lax.cond(few.all(), lambda: (best, *complete), scan_others)


def _verified(bloom, plan, found: RowResult, k: int, eligible: Int32[Array, "Q"]):
    """What `_one_round` returns, of rows found by masks that pass too many."""
    num_masks = plan.num_queries
    passes = bloom.verify(plan, found.rows.reshape(num_masks, -1)).reshape(found.rows.shape)
    scores, places = lax.top_k(jnp.where(passes, found.scores, -jnp.inf), k)
    rows = jnp.take_along_axis(found.rows, places, axis=1)
    rows = jnp.where(jnp.isneginf(scores), -1, rows)
    wrong = jnp.where(passes, -1, found.rows).reshape(num_masks, -1)
    filled = jnp.sum(rows >= 0, axis=1)
    wrong_of_filter = jnp.repeat(jnp.sum(wrong >= 0, axis=1), len(rows) // num_masks)
    remaining = eligible - wrong_of_filter
    return RowResult(scores, rows, found.exact), (filled < k) & (remaining > filled), wrong


def search_compact(
    ivf: IVFIndex,
    bloom: BloomIndex,
    plan: FilterPlan,
    queries: Float[Array, "M H D"],
    mask: UInt32[Array, "M words"],
    counts: Int32[Array, "M"],
    k: int,
) -> RowResult:
    """The best of the first `counts` rows of each mask that pass: gathered and scored in f32.

    Each row is verified once for all queries that share the mask. Rows come in chunks; a later one
    is ranked together with the best so far.
    """
    num_masks, heads, _ = queries.shape
    chunk = max(_CHUNK if heads < _MANY_HEADS else 4 * _CHUNK, k)
    nothing = jnp.full((heads, k), -jnp.inf), jnp.full((heads, k), -1, jnp.int32)

    def score(places, number, words, ends, queries, count):
        rows = jnp.where(places < count, rows_at(words, ends, places), -1)
        passes = bloom.verify(plan.for_queries(number[None]), rows[None])[0]
        vectors = jnp.asarray(ivf.vectors)[jnp.maximum(rows, 0)].astype(jnp.float32)
        scores = jnp.einsum("hd,nd->hn", queries, vectors, precision=lax.Precision.HIGHEST)
        return jnp.where(passes, scores, -jnp.inf), rows

    def one_chunk(*mask):
        scores, rows = score(jnp.arange(chunk, dtype=jnp.int32), *mask)
        scores, at = lax.top_k(scores, k)
        return scores, rows[at]

    def more_chunks(*mask):
        def step(i, best):
            scores, rows = score(i * chunk + jnp.arange(chunk, dtype=jnp.int32), *mask)
            scores, at = lax.top_k(jnp.concatenate([best[0], scores], axis=1), k)
            earlier = jnp.take_along_axis(best[1], jnp.minimum(at, k - 1), axis=1)
            return scores, jnp.where(at < k, earlier, rows[jnp.maximum(at - k, 0)])

        return lax.fori_loop(0, (mask[-1] + chunk - 1) // chunk, step, nothing)

    def one_mask(operands):
        number, words, queries, count = operands
        ends = jnp.cumsum(lax.population_count(words).astype(jnp.int32))
        size = (count > 0).astype(jnp.int32) + (count > chunk)
        branches = (lambda *_: nothing, one_chunk, more_chunks)
        return lax.switch(size, branches, number, words, ends, queries, count)

    numbers = jnp.arange(num_masks, dtype=jnp.int32)
    scores, rows = lax.map(one_mask, (numbers, mask, as_queries(ivf, queries), counts))
    scores, rows = scores.reshape(-1, k), rows.reshape(-1, k)
    exact = jnp.full(len(scores), ivf.vectors.dtype == jnp.float32)
    return RowResult(scores, jnp.where(jnp.isneginf(scores), -1, rows), exact)


def _select(choose: Bool[Array, "Q"], new: RowResult, old: RowResult) -> RowResult:
    return RowResult(
        *(jnp.where(choose.reshape(-1, *[1] * (a.ndim - 1)), a, b)
          for a, b in zip(new, old, strict=True))
    )  # fmt: skip
