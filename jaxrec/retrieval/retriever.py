"""Retrieval as one model: user tower, filters and item index behind one jitted call."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, Key

from jaxrec.ops.jagged import JaggedBatch, segment_ids
from jaxrec.retrieval.bloom_index import FilterLike
from jaxrec.retrieval.item_index import Explanation, ItemIndex
from jaxrec.retrieval.ivf_index import Metric, SearchResult
from jaxrec.retrieval.plan import FilterPlan
from jaxrec.retrieval.search_index import SearchIndex

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


class Retriever(nnx.Module):
    """The served model: weights are `nnx.Param`, index tensors `IndexState`.

    Build from a trained model with `Retriever.build`, publish with `jaxrec.retrieval.publish`.

    Attributes:
      model: the user tower.
      vocabulary: raw ids of the items, if they were given.
    """

    def __init__(
        self, model: nnx.Module, index: SearchIndex, *, vocabulary: Vocabulary | None = None
    ):
        self.model = model
        self.vocabulary = vocabulary
        arrays, self.index_layout = jax.tree.flatten(index)
        self.index_arrays = nnx.List([IndexState(jnp.asarray(x)) for x in arrays])

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
        sample_queries: Float[_Array, "S D"] | None = None,
        vocabulary: Sequence[str] | None = None,
    ) -> "Retriever":
        """Indexes the model's items and their attributes.

        Args:
          model: a `UserTower` and NNX module.
          features: as for `BloomIndex.build`, one entry for each item 1..V-1 in this order.
          key, nlist, metric, max_fpr, recall, sample_queries: see `ItemIndex.build`.
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
        index = ItemIndex.build(
            rows, features, key=key, ids=np.arange(1, len(rows) + 1), nlist=nlist, metric=metric,
            max_fpr=max_fpr, recall=recall, sample_queries=sample_queries,
        )  # fmt: skip
        names = None if vocabulary is None else Vocabulary(tuple(map(str, vocabulary)))
        return cls(model, index, vocabulary=names)

    @property
    def index(self) -> SearchIndex:
        """The item index; its ids are item numbers."""
        return jax.tree.unflatten(self.index_layout, [x[...] for x in self.index_arrays])

    def with_index(self, index: SearchIndex) -> "Retriever":
        """The same model over another index, such as a `LiveIndex` or its next state.

        Nothing is compiled anew where shapes and static parts are the same.
        """
        return Retriever(self.model, index, vocabulary=self.vocabulary)

    def compile(self, filters: Sequence[FilterLike]) -> FilterPlan:
        """One filter a query to a plan; see `BloomIndex.compile`."""
        return self.index.compile(filters)

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
        exclude_history: bool | int = False,
        exclude: Int[_Array, "M X"] | None = None,
    ) -> SearchResult:
        """The k best eligible items for each of the batch's M target positions, in one jitted call.

        Args:
          batch: what the tower encodes; M is the length of `target_positions`.
          plan: from `compile`, with M programs.
          k, nprobe, exact: see `ItemIndex.search`.
          exclude_history: leave out the items of the query's sequence up to its target position; a
            number leaves out the last so many, at less cost (M times as many ids are looked up).
          exclude: further items to leave out, -1 for none.

        Raises:
          ValueError: k or nprobe out of range, or another number of programs than targets.
        """
        self.index.check_search(k, nprobe)
        if plan.num_queries != batch.target_positions.shape[0]:
            raise ValueError(
                f"the plan has {plan.num_queries} filters and the batch "
                f"{batch.target_positions.shape[0]} target positions; compile one filter for each"
            )
        graphdef, state = nnx.split(self)
        window = batch.item_ids.shape[0] if exclude_history is True else int(exclude_history)
        return _retrieve(graphdef, state, batch, plan, exclude, k, nprobe, exact, window)

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
        return self.index.explain(query, filter, item, nprobe=nprobe)

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


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7, 8))
def _retrieve(graphdef, state, batch, plan, exclude, k, nprobe, exact, window) -> SearchResult:
    retriever = nnx.merge(graphdef, state)
    if window:
        seen = history(batch, window)
        exclude = seen if exclude is None else jnp.concatenate([seen, exclude], axis=1)
    queries = retriever.queries(batch)
    return retriever.index.search(queries, plan, k=k, nprobe=nprobe, exact=exact, exclude=exclude)


def history(batch: JaggedBatch, window: int) -> Int32[Array, "M {window}"]:
    """The last `window` items of each target's sequence up to the target, -1 where it has fewer."""
    item_ids = jnp.asarray(batch.item_ids)
    targets = jnp.asarray(batch.target_positions)
    first = jnp.asarray(batch.seq_offsets)[segment_ids(batch.seq_offsets, len(item_ids))[targets]]
    tokens = targets[:, None] - jnp.arange(window, dtype=targets.dtype)
    return jnp.where(tokens >= first[:, None], item_ids[jnp.maximum(tokens, 0)], -1)
