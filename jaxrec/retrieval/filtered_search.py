"""Top-k search among the items that pass a filter: nothing eligible is lost, nothing else found."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

from jaxrec.retrieval.bloom_index import BloomIndex
from jaxrec.retrieval.ivf_index import IVFIndex, Precision, RowResult, search_rows
from jaxrec.retrieval.plan import FilterPlan
from pallas_kernels import IVF_MAX_K

FEW_ELIGIBLE = 16
"""Queries whose filter passes fewer than this many times k items search all lists."""


def search_eligible(
    ivf: IVFIndex,
    bloom: BloomIndex,
    plan: FilterPlan,
    queries: Float[Array, "Q D"],
    excluded: UInt32[Array, "Q words"] | None,
    *,
    k: int,
    nprobe: int,
    precision: Precision,
) -> RowResult:
    """The k best rows that pass the plan and are not excluded; traceable.

    Up to three rounds, the later ones only where a query lacks results though items may remain, and
    only for these queries' results: the probed lists; all lists, without the false positives found
    so far; all lists with the exact mask.
    """

    def allowed(mask):
        return (
            mask & bloom.live & ivf.live & (~excluded if excluded is not None else ~jnp.uint32(0))
        )

    fetch = max(k, min(k + k // 4 + 32, ivf.num_items, IVF_MAX_K))
    search = functools.partial(
        _verified_round, ivf, bloom, plan, queries, k=k, fetch=fetch, precision=precision
    )

    def refill(state, lists: int):
        mask, found, lacking = state
        new_mask, new, still = search(mask, nprobe=lists)
        return new_mask, _select(lacking, new, found), lacking & still

    state = search(allowed(bloom.masks(plan).possibly), nprobe=nprobe)
    state = lax.cond(state[2].any(), lambda s: refill(s, ivf.nlist), lambda s: s, state)
    state = lax.cond(
        state[2].any(),
        lambda s: refill((allowed(bloom.exact_mask(plan)), *s[1:]), ivf.nlist),
        lambda s: s,
        state,
    )
    return state[1]


def _verified_round(ivf, bloom, plan, queries, mask, *, k, fetch, nprobe, precision):
    """(mask without the false positives met, the k best that pass, queries to search on)."""
    found = search_rows(ivf, queries, mask, k=fetch, nprobe=nprobe, precision=precision)
    passes = bloom.verify(plan, found.rows)
    eligible = jnp.sum(lax.population_count(mask), axis=1, dtype=jnp.int32)
    mask = _without_rows(mask, found.rows, (found.rows >= 0) & ~passes)
    scores, places = lax.top_k(jnp.where(passes, found.scores, -jnp.inf), k)
    rows = jnp.take_along_axis(found.rows, places, axis=1)
    rows = jnp.where(jnp.isneginf(scores), -1, rows)
    filled = jnp.sum(rows >= 0, axis=1)
    remaining = jnp.sum(lax.population_count(mask), axis=1, dtype=jnp.int32)
    lacking = (filled < k) & (remaining > filled)
    if nprobe < ivf.nlist:
        # The best of few eligible items lie scattered over all lists, and few are soon scored.
        lacking |= eligible < FEW_ELIGIBLE * k
    return mask, RowResult(scores, rows, found.exact), lacking


def _select(choose: Bool[Array, "Q"], new: RowResult, old: RowResult) -> RowResult:
    return RowResult(
        *(jnp.where(choose.reshape(-1, *[1] * (a.ndim - 1)), a, b)
          for a, b in zip(new, old, strict=True))
    )  # fmt: skip


def _without_rows(mask, rows, chosen) -> UInt32[Array, "Q words"]:
    """The mask with the bits of the chosen rows cleared; a row is chosen once, and its bit set."""
    bits = jnp.where(chosen, jnp.uint32(1) << (rows % 32).astype(jnp.uint32), 0)
    queries = jnp.arange(mask.shape[0])[:, None]
    return mask.at[queries, jnp.maximum(rows, 0) // 32].add(-bits)
