"""Retrieval as one model: user tower, filters and item index behind one jitted call."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, Key

from jaxrec.nn import ValueModel, overarch_of
from jaxrec.nn.value_model import Part
from jaxrec.ops.jagged import JaggedBatch, segment_ids
from jaxrec.retrieval.bloom_index import FilterLike
from jaxrec.retrieval.item_index import Explanation, ItemIndex
from jaxrec.retrieval.ivf_index import Metric, SearchResult
from jaxrec.retrieval.merge import POLICIES, Policy, merge_candidates
from jaxrec.retrieval.plan import FilterPlan
from jaxrec.retrieval.ranking import (
    COMPONENT,
    component_columns,
    heads_of,
    rank,
    task_scores,
    tasks_of,
)
from jaxrec.retrieval.search_index import SearchIndex

CANDIDATES = 1000
"""Candidates that are ranked for each user, unless told otherwise."""

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


class RankExplanation(NamedTuple):
    """Why an item was, or was not, returned, and where its value comes from.

    Attributes:
      search: for each task, what the search makes of the item.
      scores: for each task, the over-arch's score (the inner product without one). Of a listwise
        over-arch, the score of the item alone.
      parts: values of the value model's sub-expressions, parts before the whole; () without one.
      value: what the item is ranked by.
    """

    search: dict[str, Explanation]
    scores: dict[str, float]
    parts: tuple[Part, ...]
    value: float

    @property
    def rejected_by(self) -> str | None:
        """Smallest part of the filter that rejects the item; None if it passes."""
        return next(iter(self.search.values())).rejected_by


class Retriever(nnx.Module):
    """The served model: weights are `nnx.Param`, index tensors `IndexState`.

    User tower → a query for each task → search of the one index → merge → over-arch → value model
    → the best k; whatever the model has not is left out. Build from a trained model with
    `Retriever.build`, publish with `jaxrec.retrieval.publish`.

    Attributes:
      model: a `UserTower`; its `heads` (`TaskHeads`) and `overarch` are used if it has them.
      value_model: turns the tasks' scores and columns of the index into the final score.
      merge: policy that makes one list of candidates of what the tasks found; see
        `merge_candidates`.
      vocabulary: raw ids of the items, if they were given.

    Raises:
      ValueError: several tasks without a value model, or one for other tasks; a column that the
        value model or the over-arch needs is not in the index; an unknown policy.
    """

    def __init__(
        self,
        model: nnx.Module,
        index: SearchIndex,
        *,
        value_model: ValueModel | None = None,
        merge: str | Policy = "union",
        vocabulary: Vocabulary | None = None,
    ):
        _check_parts(model, index, value_model, merge)
        self.model = model
        self.value_model = value_model
        self.merge = merge
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
        columns: Mapping[str, _Array] | None = None,
        value_model: ValueModel | None = None,
        merge: str | Policy = "union",
        component_dtype: Literal["float32", "bfloat16"] = "float32",
        vocabulary: Sequence[str] | None = None,
    ) -> "Retriever":
        """Indexes the model's items, their attributes and what its over-arch caches of them.

        Args:
          model: a `UserTower` and NNX module.
          features: as for `BloomIndex.build`, one entry for each item 1..V-1 in this order.
          key, nlist, metric, max_fpr, recall, sample_queries: see `ItemIndex.build`.
          columns: numbers for each item 1..V-1 that the value model may read, by name.
          value_model, merge: see the class.
          component_dtype: how the over-arch's components are kept.
          vocabulary: raw ids of the items 1..V-1.

        Raises:
          ValueError: lengths that do not fit the embedding table, and what the indexes raise.
        """
        rows = np.asarray(_tower(model).item_embeddings(), np.float32)[1:]
        columns = dict(columns or {})
        named = {**features, **columns}
        named |= {} if vocabulary is None else {"vocabulary": vocabulary}
        for name, column in named.items():
            if len(column) != len(rows):
                raise ValueError(
                    f"{name} has {len(column)} entries; the model has {len(rows)} items (its "
                    f"{len(rows) + 1} embedding rows without row 0, the padding)"
                )
        index = ItemIndex.build(
            rows, features, key=key, ids=np.arange(1, len(rows) + 1), nlist=nlist, metric=metric,
            max_fpr=max_fpr, recall=recall, sample_queries=sample_queries,
            columns=columns | component_columns(model, rows, dtype=component_dtype),
        )  # fmt: skip
        names = None if vocabulary is None else Vocabulary(tuple(map(str, vocabulary)))
        return cls(model, index, value_model=value_model, merge=merge, vocabulary=names)

    @property
    def index(self) -> SearchIndex:
        """The item index; its ids are item numbers."""
        return jax.tree.unflatten(self.index_layout, [x[...] for x in self.index_arrays])

    def compile(self, filters: Sequence[FilterLike]) -> FilterPlan:
        """One filter a query to a plan; see `BloomIndex.compile`."""
        return self.index.compile(filters)

    def with_index(self, index: SearchIndex) -> "Retriever":
        """The same model over another index, such as a `LiveIndex` or its next state.

        Nothing is compiled anew where shapes and static parts are the same.
        """
        return Retriever(
            self.model, index, value_model=self.value_model, merge=self.merge,
            vocabulary=self.vocabulary,
        )  # fmt: skip

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks (T of them); a model without heads has one."""
        return tasks_of(self.model)

    @property
    def ranks(self) -> bool:
        """Whether candidates go through merge, over-arch and value model at all."""
        parts = (self.value_model, overarch_of(self.model), heads_of(self.model))
        return any(part is not None for part in parts)

    def queries(self, batch: JaggedBatch) -> Float32[Array, "M *tasks D"]:
        """Query vectors: the tower's output at each target position; with heads, one a task."""
        return _queries(*nnx.split(self.model), batch)

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
        num_candidates: int | None = None,
    ) -> SearchResult:
        """The k best eligible items for each of the batch's M target positions, in one jitted call.

        With an over-arch, heads or a value model, each task's best `num_candidates` are searched,
        merged into as many candidates, and ranked; `exact` in the result then says that all
        eligible items were candidates.

        Args:
          batch: what the tower encodes; M is the length of `target_positions`.
          plan: from `compile`, with M programs.
          k, nprobe, exact: see `ItemIndex.search`.
          exclude_history: leave out the items of the query's sequence up to its target position; a
            number leaves out the last so many, at less cost (M times as many ids are looked up).
          exclude: further items to leave out, -1 for none.
          num_candidates: K0, k at least; None takes 1000 (or k, or all items). Of no effect where
            nothing is ranked after the search.

        Raises:
          ValueError: k, nprobe or num_candidates out of range, or another number of programs than
            targets.
        """
        index = self.index
        index.check_search(k, nprobe)
        if num_candidates is None:
            num_candidates = max(k, min(CANDIDATES, index.max_k))
        elif num_candidates < k:
            raise ValueError(f"num_candidates is {num_candidates}; expected k = {k} or more")
        if self.ranks:
            index.check_search(num_candidates, nprobe)
        if plan.num_queries != batch.target_positions.shape[0]:
            raise ValueError(
                f"the plan has {plan.num_queries} filters and the batch "
                f"{batch.target_positions.shape[0]} target positions; compile one filter for each"
            )
        graphdef, state = nnx.split(self)
        window = batch.item_ids.shape[0] if exclude_history is True else int(exclude_history)
        return _retrieve(
            graphdef, state, batch, plan, exclude, k, nprobe, exact, window, num_candidates
        )

    def explain(
        self,
        query: Float[_Array, "*tasks D"],
        filter: FilterLike,
        item: int,
        *,
        k: int | None = None,
        nprobe: int | None = None,
    ) -> RankExplanation:
        """What search and ranking make of one item for one user. Host only.

        Args:
          query: the user's vector, or one a task; a row of `queries`.
          k: items that are searched for, as candidates where they are ranked; None takes 1000 then
            and 100 otherwise.
          nprobe: see `ItemIndex.search`.

        Raises:
          ValueError: the index holds no such item.
        """
        k = (CANDIDATES if self.ranks else 100) if k is None else k
        index, queries = self.index, jnp.asarray(query, jnp.float32).reshape(len(self.tasks), -1)
        search = {
            task: index.explain(own, filter, item, k=k, nprobe=nprobe)
            for task, own in zip(self.tasks, queries, strict=True)
        }
        ids = np.full((1, 1), item, np.int32)
        columns, vectors = index.gather(ids), index.vectors_of(ids)
        scores = _scores(*nnx.split(self.model), queries[None], columns, vectors)
        by_task = dict(zip(self.tasks, scores[0, 0].tolist(), strict=True))
        if self.value_model is None:
            return RankExplanation(search, by_task, (), by_task[self.tasks[0]])
        features = {name: columns[name][0, 0] for name in self.value_model.features}
        parts = self.value_model.explain({**features, **by_task})
        return RankExplanation(search, by_task, parts, float(parts[-1].value))

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


def _check_parts(
    model: Any, index: SearchIndex, value_model: ValueModel | None, merge: Any
) -> None:
    tasks, columns = tasks_of(model), set(index.columns)
    if value_model is None and len(tasks) > 1:
        raise ValueError(
            f"the model has the tasks {', '.join(tasks)}: a value_model must say how their scores "
            "make one"
        )
    if value_model is not None and heads_of(model) is not None and value_model.tasks != tasks:
        raise ValueError(
            f"the value model is for the tasks {', '.join(value_model.tasks)}; the model's are "
            f"{', '.join(tasks)}, in this order"
        )
    if value_model is not None and len(value_model.tasks) != len(tasks):
        raise ValueError(
            f"the value model is for {len(value_model.tasks)} tasks; the model has {len(tasks)}"
        )
    missing = sorted(set(value_model.features if value_model else ()) - columns)
    if missing:
        raise ValueError(
            f"the value model reads the columns {', '.join(missing)}; the index has "
            f"{', '.join(sorted(columns)) or 'none'}: build it with columns="
        )
    if overarch_of(model) is not None and not any(name.startswith(COMPONENT) for name in columns):
        raise ValueError(
            "the index lacks the over-arch's item components; build it with "
            "columns=component_columns(model, embeddings), as Retriever.build does"
        )
    if isinstance(merge, str) and merge not in POLICIES:
        raise ValueError(
            f"unknown merge policy {merge!r}; expected one of {', '.join(POLICIES)}, or a function"
        )


@functools.partial(jax.jit, static_argnums=0)
def _queries(graphdef, state, batch):
    model = nnx.merge(graphdef, state)
    hidden = _tower(model).encode(batch)[jnp.asarray(batch.target_positions)]
    heads = heads_of(model)
    return (hidden if heads is None else heads(hidden)).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _scores(graphdef, state, queries, columns, vectors):
    valid = jnp.ones(vectors.shape[:2], bool)
    return task_scores(nnx.merge(graphdef, state), queries, columns, vectors, valid)


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7, 8, 9))
def _retrieve(
    graphdef, state, batch, plan, exclude, k, nprobe, exact, window, num_candidates
) -> SearchResult:
    retriever = nnx.merge(graphdef, state)
    if window:
        seen = history(batch, window)
        exclude = seen if exclude is None else jnp.concatenate([seen, exclude], axis=1)
    options = {"nprobe": nprobe, "exact": exact}
    queries, index = retriever.queries(batch), retriever.index
    if not retriever.ranks:
        return index.search(queries, plan, k=k, exclude=exclude, **options)
    return _search_and_rank(retriever, queries, plan, exclude, k, num_candidates, options)


def _search_and_rank(retriever, queries, plan, exclude, k, num_candidates, options):
    index, model = retriever.index, retriever.model
    queries = queries.reshape(len(queries), len(retriever.tasks), -1)
    found = index.search(queries, plan, k=num_candidates, exclude=exclude, **options)
    ids, valid = merge_candidates(
        found.ids, found.scores, policy=retriever.merge, num_candidates=num_candidates
    )
    columns = index.gather(ids)
    vectors = index.vectors_of(ids) if overarch_of(model) is None else None
    scores = task_scores(model, queries, columns, vectors, valid)
    values, ids = rank(scores, ids, valid, columns, retriever.value_model, k)
    # A task with free slots has found every eligible item, so all of them are candidates.
    all_found = (found.filled < num_candidates) | (num_candidates >= index.count())
    filled = jnp.sum(ids >= 0, axis=1, dtype=jnp.int32)
    return SearchResult(values, ids, filled, (found.exact & all_found).all(axis=1))


def history(batch: JaggedBatch, window: int) -> Int32[Array, "M {window}"]:
    """The last `window` items of each target's sequence up to the target, -1 where it has fewer."""
    item_ids = jnp.asarray(batch.item_ids)
    targets = jnp.asarray(batch.target_positions)
    first = jnp.asarray(batch.seq_offsets)[segment_ids(batch.seq_offsets, len(item_ids))[targets]]
    tokens = targets[:, None] - jnp.arange(window, dtype=targets.dtype)
    return jnp.where(tokens >= first[:, None], item_ids[jnp.maximum(tokens, 0)], -1)
