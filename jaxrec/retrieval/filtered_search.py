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
    make_plan,
    probe_counts,
)
from pallas_kernels import IVF_MAX_K

_ROUNDS = 3
_CHUNK = 1 << 10  # eligible rows gathered at a time for one query; more for more


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
    all rows with the exact mask. Returns M·H queries.
    """
    num_queries, k = queries.shape[0] * queries.shape[1], options.k
    words = ivf.live.shape[0]

    def one_round(state):
        number, mask, best, lacking = state
        found, still, wrong = _verified_round(
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


def _verified_round(ivf, bloom, plan, queries, mask, options, *, all_rows):
    """(the k best that pass, queries to search on, rows found that do not pass; -1 elsewhere)."""
    num_masks, heads, k = *queries.shape[:2], options.k
    # Room for false positives, which are few: where they are more, the next round follows.
    fetch = max(k, min(k + k // 8 + 16, ivf.num_items, IVF_MAX_K))
    found = _search(ivf, queries, mask, fetch, options, all_rows)
    passes = bloom.verify(plan, found.rows.reshape(num_masks, -1)).reshape(found.rows.shape)
    scores, places = lax.top_k(jnp.where(passes, found.scores, -jnp.inf), k)
    rows = jnp.take_along_axis(found.rows, places, axis=1)
    rows = jnp.where(jnp.isneginf(scores), -1, rows)
    wrong = jnp.where(passes, -1, found.rows)
    filled = jnp.sum(rows >= 0, axis=1)
    remaining = jnp.repeat(_count(mask), heads) - jnp.sum(wrong >= 0, axis=1)
    lacking = (filled < k) & (remaining > filled)
    return RowResult(scores, rows, found.exact), lacking, wrong.reshape(num_masks, -1)


def _search(ivf, queries, mask, fetch: int, options, all_rows) -> RowResult:
    """The `fetch` best rows of each query, by the strategies that the planner picks."""
    num_masks, heads, width = queries.shape
    scan = functools.partial(
        search_rows, ivf, queries.reshape(-1, width), mask,
        mask_of_query=jnp.repeat(jnp.arange(num_masks, dtype=jnp.int32), heads),
        k=fetch, nprobe=ivf.nlist, precision="float" if options.exact else "rescored",
    )  # fmt: skip
    eligible = _count(mask)
    strategy, share = _make_plan(ivf, eligible, heads, options, all_rows)
    few = strategy == Strategy.COMPACT

    def each_its_own():
        compact = search_compact(ivf, queries, mask, jnp.where(few, eligible, 0), fetch)
        probing = jnp.repeat(~few, heads)

        def probe():
            probes = _probes(ivf, queries, mask, share, options)
            return _select(probing, scan(probes=jnp.where(probing, probes, 0)), compact)

        return lax.cond(probing.any(), probe, lambda: compact)

    return lax.cond(strategy[0] == Strategy.SCAN, scan, each_its_own)


def search_compact(ivf, queries, mask, counts, fetch: int) -> RowResult:
    """The best of the first `counts` rows of each mask: gathered in chunks and scored in f32.

    Small chunks waste little on few rows; large ones need few top-k for many.
    """
    heads = queries.shape[1]
    small = _CHUNK * max(1, min(heads // 8, 4))
    nothing = jnp.full((heads, fetch), -jnp.inf), jnp.full((heads, fetch), -1, jnp.int32)

    def in_chunks(chunk, words, queries, count):
        ends = jnp.cumsum(lax.population_count(words).astype(jnp.int32))

        def step(i, best):
            places = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
            rows = rows_at(words, ends, places)
            vectors = jnp.asarray(ivf.vectors)[rows].astype(jnp.float32)
            scores = jnp.einsum("hd,nd->hn", queries, vectors, precision=lax.Precision.HIGHEST)
            scores = jnp.where(places < count, scores, -jnp.inf)
            scores, at = lax.top_k(scores, min(fetch, chunk))
            scores = jnp.concatenate([best[0], scores], axis=1)
            rows = jnp.concatenate([best[1], rows[at]], axis=1)
            scores, at = lax.top_k(scores, fetch)
            return scores, jnp.take_along_axis(rows, at, axis=1)

        return lax.fori_loop(0, (count + chunk - 1) // chunk, step, nothing)

    branches = [
        lambda *_: nothing,
        functools.partial(in_chunks, small),
        functools.partial(in_chunks, 8 * small),
    ]

    def one_mask(operands):
        count = operands[2]
        size = (count > 0).astype(jnp.int32) + (count > 4 * small)
        return lax.switch(size, branches, *operands)

    scores, rows = lax.map(one_mask, (mask, as_queries(ivf, queries), counts))
    scores, rows = scores.reshape(-1, fetch), rows.reshape(-1, fetch)
    exact = jnp.full(len(scores), ivf.vectors.dtype == jnp.float32)
    return RowResult(scores, jnp.where(jnp.isneginf(scores), -1, rows), exact)


def _select(choose: Bool[Array, "Q"], new: RowResult, old: RowResult) -> RowResult:
    return RowResult(
        *(jnp.where(choose.reshape(-1, *[1] * (a.ndim - 1)), a, b)
          for a, b in zip(new, old, strict=True))
    )  # fmt: skip
