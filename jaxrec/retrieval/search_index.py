"""What a `Retriever` needs of an item index."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxrec.retrieval.bloom_index import FilterLike
from jaxrec.retrieval.item_index import Explanation
from jaxrec.retrieval.ivf_index import SearchResult
from jaxrec.retrieval.plan import FilterPlan

type _Array = jax.Array | np.ndarray


@runtime_checkable
class SearchIndex(Protocol):
    """An item index that can be served: `ItemIndex`, `LiveIndex`, `ShardedIndex`.

    It also has to be a pytree of arrays whose static part is hashable, as it is kept as
    `IndexState` variables; `search` and `gather` have to be traceable.
    """

    @property
    def num_items(self) -> int:
        """Items that can be found; may wait for the device."""
        ...

    @property
    def max_k(self) -> int:
        """The most results that `search` takes; static."""
        ...

    def count(self) -> Int32[Array, ""]:
        """Items that can be found; traceable."""
        ...

    def compile(self, filters: Sequence[FilterLike]) -> FilterPlan:
        """One filter a query to a plan for `search`."""
        ...

    def check_search(self, k: int, nprobe: int | None = None) -> None:
        """Raises ValueError unless `search` takes these numbers."""
        ...

    def search(
        self,
        queries: Float[_Array, "Q *heads D"],
        plan: FilterPlan,
        *,
        k: int,
        nprobe: int | None = None,
        exact: bool = False,
        exclude: Int[_Array, "Q X"] | None = None,
    ) -> SearchResult:
        """The k best items for each query that pass its filter; see `ItemIndex.search`."""
        ...

    def gather(self, ids: Int[_Array, "*shape"]) -> dict[str, Array]:
        """The values of all columns for these items; zeros for ids not held."""
        ...

    def vectors_of(self, ids: Int[_Array, "*shape"]) -> Float[Array, "*shape D"]:
        """The items' vectors in f32; zeros for ids not held."""
        ...

    @property
    def columns(self) -> Mapping[str, Any]:
        """Names of what `gather` gives."""
        ...

    def explain(
        self,
        query: Float[_Array, "D"],
        filter: FilterLike,
        item: int,
        *,
        k: int = 100,
        nprobe: int | None = None,
    ) -> Explanation:
        """What the search makes of one item for one query vector."""
        ...
