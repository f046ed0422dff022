"""Retrieval as one model: user tower, filters and item index behind one jitted call."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Key, UInt32

from jaxrec.ops.jagged import JaggedBatch, segment_ids
from jaxrec.retrieval.bloom_index import BloomIndex, FilterLike
from jaxrec.retrieval.ivf_index import (
    IVFIndex,
    Metric,
    Precision,
    RowResult,
    SearchResult,
    check_search,
    list_of_row,
    list_scores,
    search_rows,
    tune_nprobe,
    with_ids,
)
from jaxrec.retrieval.plan import FilterPlan
from pallas_kernels import IVF_MAX_K

type _Array = jax.Array | np.ndarray


class IndexState(nnx.Variable):
    """An index tensor: neither trained nor touched by an optimizer, published with the weights."""


class UserTower(Protocol):
    """What a model needs to be served; row 0 of the item embeddings is padding."""

    def encode(self, batch: JaggedBatch) -> Float[Array, "T D"]:
        """A hidden state for each token, from the tokens of its sequence up to it."""
        ...

    def item_embeddings(self) -> Float[Array, "V D"]:
        """The vectors that hidden states are compared with."""
        ...


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Raw ids of the items 1..V-1. Compared by identity: it is static to `jax.jit`, and large."""

    raw_ids: tuple[str, ...]


class Explanation(NamedTuple):
    """Why an item was, or was not, returned.

    Attributes:
      rejected_by: smallest part of the filter that rejects the item; None if it passes.
      list_rank: how many lists score better than the item's own; it is scanned if below nprobe.
      probed: whether the item's list is scanned.
      score: inner product of the query and the item's row.
      code_score: the same from the int8 codes.
    """

    rejected_by: str | None
    list_rank: int
    probed: bool
    score: float
    code_score: float


class Retriever(nnx.Module):
    """The served model: weights are `nnx.Param`, index tensors `IndexState`.

    Build from a trained model with `Retriever.build`, publish with `jaxrec.retrieval.publish`.

    Attributes:
      model: the user tower.
      nprobe: lists scanned by default.
      vocabulary: raw ids of the items, if they were given.
    """

    def __init__(
        self,
        model: nnx.Module,
        bloom: BloomIndex,
        ivf: IVFIndex,
        *,
        nprobe: int,
        vocabulary: Vocabulary | None = None,
    ):
        if bloom.num_items != len(ivf.row_ids):
            raise ValueError(
                f"the Bloom index has {bloom.num_items} positions and the IVF index "
                f"{len(ivf.row_ids)} rows; build the first with order=ivf.row_ids"
            )
        self.model = model
        self.nprobe = nprobe
        self.vocabulary = vocabulary
        bloom_arrays, self.bloom_layout = jax.tree.flatten(bloom)
        ivf_arrays, self.ivf_layout = jax.tree.flatten(ivf)
        self.bloom_arrays = nnx.List([IndexState(jnp.asarray(x)) for x in bloom_arrays])
        self.ivf_arrays = nnx.List([IndexState(jnp.asarray(x)) for x in ivf_arrays])

    @classmethod
    def build(
        cls,
        model: nnx.Module,
        features: Mapping[str, Any],
        *,
        key: Key[Array, ""],
        nlist: int | None = None,
        metric: Metric = "ip",
        max_fpr: float = 1e-3,
        recall: float = 0.95,
        vocabulary: Sequence[str] | None = None,
    ) -> "Retriever":
        """Indexes the model's items and their attributes.

        Args:
          model: a `UserTower` and NNX module.
          features: as for `BloomIndex.build`, one entry for each item 1..V-1 in this order.
          key: seeds k-means and the measurement of recall.
          nlist: lists of the IVF index; None takes the square root of the number of items.
          metric: "ip" or "cosine".
          max_fpr: of the Bloom index.
          recall: the default nprobe is the smallest that holds this part of the true top 100, on
            sampled items as queries.
          vocabulary: raw ids of the items 1..V-1.

        Raises:
          ValueError: lengths that do not fit the embedding table, and what the indexes raise.
        """
        rows = np.asarray(_tower(model).item_embeddings(), np.float32)[1:]
        named = {**features} if vocabulary is None else {**features, "vocabulary": vocabulary}
        for name, column in named.items():
            if len(column) != len(rows):
                raise ValueError(
                    f"{name} has {len(column)} entries; the model has {len(rows)} items (its "
                    f"{len(rows) + 1} embedding rows without row 0, the padding)"
                )
        build_key, tune_key = jax.random.split(key)
        item_numbers = np.arange(1, len(rows) + 1)
        nlist = max(1, round(len(rows) ** 0.5)) if nlist is None else nlist
        ivf = IVFIndex.build(rows, nlist=nlist, key=build_key, metric=metric, row_ids=item_numbers)
        order = np.asarray(ivf.row_ids)
        bloom = BloomIndex.build(
            features, max_fpr=max_fpr, order=np.where(order > 0, order - 1, -1)
        )
        nprobe, _ = tune_nprobe(ivf, tune_key, recall=recall)
        names = None if vocabulary is None else Vocabulary(tuple(map(str, vocabulary)))
        return cls(model, bloom, ivf, nprobe=nprobe, vocabulary=names)

    @property
    def bloom(self) -> BloomIndex:
        """The filter index, its positions in the order of the IVF index's rows."""
        return jax.tree.unflatten(self.bloom_layout, [x[...] for x in self.bloom_arrays])

    @property
    def ivf(self) -> IVFIndex:
        """The item index; its ids are item numbers."""
        return jax.tree.unflatten(self.ivf_layout, [x[...] for x in self.ivf_arrays])

    def compile(self, filters: Sequence[FilterLike]) -> FilterPlan:
        """One filter a query to a plan; see `BloomIndex.compile`."""
        return self.bloom.compile(filters)

    def queries(self, batch: JaggedBatch) -> Float32[Array, "M D"]:
        """Query vectors: the tower's output at each target position."""
        hidden = _tower(self.model).encode(batch)
        return hidden[jnp.asarray(batch.target_positions)].astype(jnp.float32)

    def __call__(
        self,
        batch: JaggedBatch,
        plan: FilterPlan,
        *,
        k: int,
        nprobe: int | None = None,
        exact: bool = False,
        exclude_history: bool = False,
    ) -> SearchResult:
        """The k best eligible items for each of the batch's M target positions, in one jitted call.

        Items returned always pass their filter: survivors of the search are checked on the stored
        attributes. A query left with fewer than k searches all lists, and if false positives still
        stand in the way, evaluates its filter on every item; so `filled` is below k only where
        fewer than k items are eligible.

        Args:
          batch: what the tower encodes; M is the length of `target_positions`.
          plan: from `compile`, with M programs.
          k: results, 1 to the number of items.
          nprobe: lists to scan, 1 to nlist; None takes the default chosen at the build.
          exact: scan every item's own row: the result equals brute force over the eligible items.
          exclude_history: leave out the items of the query's sequence up to its target position.

        Raises:
          ValueError: k or nprobe out of range, or another number of programs than targets.
        """
        nprobe = self.ivf.nlist if exact else self.nprobe if nprobe is None else nprobe
        check_search(self.ivf, k, nprobe)
        if plan.opcodes.shape[0] != batch.target_positions.shape[0]:
            raise ValueError(
                f"the plan has {plan.opcodes.shape[0]} filters and the batch "
                f"{batch.target_positions.shape[0]} target positions; compile one filter for each"
            )
        graphdef, state = nnx.split(self)
        precision = "float" if exact else "rescored"
        return _retrieve(graphdef, state, batch, plan, k, nprobe, precision, exclude_history)

    def explain(
        self,
        query: Float[_Array, "D"],
        filter: FilterLike,
        item: int,
        *,
        nprobe: int | None = None,
    ) -> Explanation:
        """What the search makes of one item for one query vector (see `queries`). Host only.

        Raises:
          ValueError: the index holds no such item.
        """
        ivf = self.ivf
        rows = np.flatnonzero(np.asarray(ivf.row_ids) == item)
        if item < 0 or not rows.size:
            raise ValueError(f"the index holds no item {item}; items are numbered from 1")
        row = rows[:1]
        scores = list_scores(ivf, query[None])[0]
        own = int(list_of_row(ivf, row)[0])
        rank = int((scores > scores[own]).sum())
        mask = np.zeros((1, ivf.live.shape[0]), np.uint32)
        mask[0, row // 32] = np.uint32(1) << np.uint32(row[0] % 32)
        parts: list[Literal["float", "int8"]] = ["float", "int8"]
        score, code_score = (
            float(search_rows(ivf, query[None], jnp.asarray(mask), k=1, nprobe=ivf.nlist,
                              precision=part).scores[0, 0])
            for part in parts
        )  # fmt: skip
        return Explanation(
            rejected_by=self.bloom.explain(filter, int(row[0])),
            list_rank=rank,
            probed=rank < (self.nprobe if nprobe is None else nprobe),
            score=score,
            code_score=code_score,
        )

    def raw_ids(self, ids: Int32[_Array, "Q k"]) -> list[list[str]]:
        """Raw ids of a result's items; absent ones (-1) are left out.

        Raises:
          ValueError: the retriever was built without a vocabulary.
        """
        if self.vocabulary is None:
            raise ValueError(
                "this retriever has no vocabulary; pass vocabulary= when publishing it"
            )
        names = self.vocabulary.raw_ids
        return [[names[i - 1] for i in row if i > 0] for row in np.asarray(ids)]


def _tower(model: nnx.Module) -> Any:
    for method in ("encode", "item_embeddings"):
        if not callable(getattr(model, method, None)):
            raise ValueError(
                f"{type(model).__name__} has no method {method}; a model is served by "
                "encode(batch) and item_embeddings()"
            )
    return model


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _retrieve(graphdef, state, batch, plan, k, nprobe, precision, exclude_history) -> SearchResult:
    retriever = nnx.merge(graphdef, state)
    ivf, bloom = retriever.ivf, retriever.bloom
    seen = history_mask(batch, ivf.row_ids) if exclude_history else None
    queries = retriever.queries(batch)
    found = search_eligible(
        ivf, bloom, plan, queries, seen, k=k, nprobe=nprobe, precision=precision
    )
    return with_ids(ivf, found)


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
    """(mask without the false positives met, the k best that pass, queries that lack results)."""
    found = search_rows(ivf, queries, mask, k=fetch, nprobe=nprobe, precision=precision)
    passes = bloom.verify(plan, found.rows)
    mask = _without_rows(mask, found.rows, (found.rows >= 0) & ~passes)
    scores, places = lax.top_k(jnp.where(passes, found.scores, -jnp.inf), k)
    rows = jnp.take_along_axis(found.rows, places, axis=1)
    rows = jnp.where(jnp.isneginf(scores), -1, rows)
    filled = jnp.sum(rows >= 0, axis=1)
    remaining = jnp.sum(lax.population_count(mask), axis=1, dtype=jnp.int32)
    return mask, RowResult(scores, rows, found.exact), (filled < k) & (remaining > filled)


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


def history_mask(batch: JaggedBatch, row_ids: Int32[_Array, "R"]) -> UInt32[Array, "M words"]:
    """Bits of the rows whose items stand in the query's sequence, up to its target position.

    Cost: M · T elements are sorted, and scattered to M · R bits.
    """
    item_ids = jnp.asarray(batch.item_ids)
    num_tokens, num_rows = item_ids.shape[0], row_ids.shape[0]
    segments = segment_ids(batch.seq_offsets, num_tokens)
    targets = jnp.asarray(batch.target_positions)
    slots = jnp.arange(num_tokens, dtype=jnp.int32)
    # Rows of items by binary search: ids are unique, apart from the -1 of padding.
    by_id = jnp.argsort(row_ids).astype(jnp.int32)
    places = jnp.minimum(jnp.searchsorted(row_ids[by_id], item_ids), num_rows - 1)
    rows = jnp.where(row_ids[by_id[places]] == item_ids, by_id[places], num_rows)
    seen = (segments == segments[targets][:, None]) & (slots <= targets[:, None])
    seen_rows = jnp.sort(jnp.where(seen, rows, num_rows), axis=1)
    first = jnp.diff(seen_rows, axis=1, prepend=-1) > 0
    # Distinct rows have distinct bits, so adding them up is the same as OR.
    bits = jnp.where(
        first & (seen_rows < num_rows), jnp.uint32(1) << (seen_rows % 32).astype(jnp.uint32), 0
    )
    queries = jnp.arange(len(targets))[:, None]
    words = jnp.minimum(seen_rows // 32, num_rows // 32 - 1)
    return jnp.zeros((len(targets), num_rows // 32), jnp.uint32).at[queries, words].add(bits)
