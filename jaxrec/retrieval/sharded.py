"""An item index split over the devices of a mesh axis: local search, then one merge.

Letters: S shards, R rows of a shard, Q queries, K results.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Int32

from jaxrec.retrieval.bloom_index import BloomIndex, FilterLike
from jaxrec.retrieval.item_index import Explanation, ItemIndex
from jaxrec.retrieval.ivf_index import SearchResult, list_of_row
from jaxrec.retrieval.masks import pack_bits
from jaxrec.retrieval.plan import FilterPlan
from pallas_kernels import IVF_MAX_K, IVF_TILE_ROWS

type _Array = jax.Array | np.ndarray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["layout", "mesh", "axis", "batch_axis", "num_items"],
)
@dataclass(frozen=True, eq=False)
class ShardedIndex:
    """S `ItemIndex`es of one shape, one on each device of a mesh axis, searched as one.

    Made from a whole index by `split`. Every list is dealt out evenly: item i of a list goes to
    shard i mod S, and all shards have the whole index's centroids and term catalogue. So a query
    probes the same lists everywhere, shards carry equal loads (within one item a list), one
    `FilterPlan` serves all, and the merged result is that of the whole index.

    The object is a pytree: arrays are leaves, the rest is static.

    Attributes:
      arrays: the shards' tensors, [S, ...] each, split over `axis`.
      layout: the tree that one shard's tensors form.
      mesh, axis: where the shards are.
      batch_axis: mesh axis over which queries are split; None keeps them whole everywhere.
      num_items: N, in all shards together.
    """

    arrays: tuple[Any, ...]
    layout: Any
    mesh: Mesh
    axis: str
    batch_axis: str | None
    num_items: int

    @classmethod
    def split(
        cls, index: ItemIndex, mesh: Mesh, *, axis: str = "items", batch_axis: str | None = None
    ) -> "ShardedIndex":
        """Deals the rows of an index out to the devices of `axis`. Host only.

        A published version is restored whole and then split, so it runs on any number of devices.
        In a run of several processes all call this with the same index; each keeps its own shards.

        Args:
          index: stays as it is.
          mesh: with `axis`, and `batch_axis` if given.
          axis: the items' axis; its size S may exceed the number of items.
          batch_axis: over which `search` and `gather` split their queries; copies of the shards
            stand along it.

        Raises:
          ValueError: an axis that the mesh does not have, or twice the same.

        Cost: the index is laid out once more on the host. Each list takes up to 64 · S - 1 rows of
        padding in all: 9 % at 10 M items in 3,162 lists on 8 devices (half of that expected).
        """
        for name in (axis,) if batch_axis is None else (axis, batch_axis):
            if name not in mesh.axis_names:
                raise ValueError(
                    f"the mesh has no axis {name!r}; it has {', '.join(mesh.axis_names)}"
                )
        if axis == batch_axis:
            raise ValueError(f"items and queries cannot both be split over the axis {axis!r}")
        order, list_tiles = _deal(index, mesh.shape[axis])
        shards = _same_shapes([_shard(index, rows, list_tiles) for rows in order])
        layout = jax.tree.structure(shards[0])
        leaves = zip(*(jax.tree.leaves(shard) for shard in shards), strict=True)
        sharding = NamedSharding(mesh, PartitionSpec(axis))
        arrays = tuple(_place(np.stack([np.asarray(x) for x in leaf]), sharding) for leaf in leaves)
        return cls(arrays, layout, mesh, axis, batch_axis, index.num_items)

    @property
    def num_shards(self) -> int:
        """S."""
        return self.mesh.shape[self.axis]

    @property
    def max_k(self) -> int:
        """The most results that `search` takes; static."""
        return min(self.num_items, IVF_MAX_K)

    def count(self) -> Int32[Array, ""]:
        """Items that can be found; traceable."""
        return jnp.asarray(self.num_items, jnp.int32)

    def compile(self, filters: Sequence[FilterLike]) -> FilterPlan:
        """One filter a query to a plan that serves all shards; see `BloomIndex.compile`."""
        return self._abstract().compile(filters)

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
        """What `ItemIndex.search` gives for the whole index; traceable.

        Of items with equal scores any may come first. The result is on all devices of `axis`, and
        split over `batch_axis`.

        Args:
          queries: f32 or bf16, [Q, D] or [Q, H, D]; on all devices of `axis`.
          plan, k, nprobe, exact, exclude: see `ItemIndex.search`; k up to all shards' items.

        Raises:
          ValueError: k or nprobe out of range, another number of programs than queries, or queries
            that `batch_axis` does not divide.

        Cost: a search of 1/S of the rows on each device, for min(K, R) results, and an all-gather
        of 8 · S · min(K, R) bytes a query.
        """
        self.check_search(k, nprobe)
        self._check_batch(len(queries), "queries")
        static = (k, nprobe, exact)
        return _search(self, jnp.asarray(queries), plan, exclude, static)

    def check_search(self, k: int, nprobe: int | None = None) -> None:
        """Raises ValueError unless `search` takes these numbers."""
        shard = self._abstract()
        if not 1 <= k <= min(self.num_items, IVF_MAX_K):
            raise ValueError(
                f"k is {k}; expected 1 to {min(self.num_items, IVF_MAX_K)} "
                f"({self.num_items} items in {self.num_shards} shards, a limit of {IVF_MAX_K})"
            )
        if not 1 <= (1 if nprobe is None else nprobe) <= shard.ivf.nlist:
            raise ValueError(
                f"nprobe is {nprobe}; expected 1 to {shard.ivf.nlist}, the number of lists"
            )

    def gather(self, ids: Int[_Array, "Q *shape"], *, split: bool = False) -> dict[str, Array]:
        """The columns' values for these items, [Q, *shape, ...] each, from the items' owners.

        So a ranking model that stands whole on every device reads its candidates' cached features,
        though no device has those of all items. Zeros for ids not held. Traceable.

        Args:
          ids: on all devices of `axis`; Q is split over `batch_axis` if there is one.
          split: leave the result split by queries over `axis` as well, for a ranking model that is
            data-parallel on the devices that hold the items.

        Raises:
          ValueError: a number of queries that the axes do not divide.

        Cost: the values of all ids, zeros where a shard has no such item, summed over `axis`: a
        reduce-scatter with `split`, an all-reduce, which moves twice the bytes, without.
        """
        self._check_batch(len(ids), "rows of ids", split=split)
        return _owned(self, jnp.asarray(ids), split, "gather")

    def vectors_of(self, ids: Int[_Array, "Q *shape"]) -> Float[Array, "Q *shape D"]:
        """The items' vectors in f32, from the items' owners; see `gather`."""
        self._check_batch(len(ids), "rows of ids")
        return _owned(self, jnp.asarray(ids), False, "vectors_of")

    @property
    def columns(self) -> Mapping[str, Any]:
        """The shards' columns by name, without their values."""
        return self._abstract().columns

    def explain(
        self,
        query: Float[_Array, "D"],
        filter: FilterLike,
        item: int,
        *,
        k: int = 100,
        nprobe: int | None = None,
    ) -> Explanation:
        """See `ItemIndex.explain`; the route is that of the item's shard. In one process only.

        Raises:
          ValueError: no shard holds such an item, or shards belong to other processes.
        """
        if not all(x.is_fully_addressable for x in self.arrays):
            raise ValueError(
                "explain needs all shards in one process; ask the whole index, before `split`"
            )
        for number in range(self.num_shards):
            shard = self._shard([np.asarray(x[number]) for x in self.arrays])
            if int(np.asarray(shard.ivf.rows_of(np.array([item], np.int32)))[0]) >= 0:
                return shard.explain(query, filter, item, k=k, nprobe=nprobe)
        raise ValueError(f"the index holds no item {item}")

    def _shard(self, arrays: Sequence[Any]) -> ItemIndex:
        return jax.tree.unflatten(self.layout, arrays)

    def _abstract(self) -> ItemIndex:
        """A shard without its tensors: what can be asked on the host, wherever the shards are."""
        # Arrays of one zero, so they take no memory whatever their shape.
        return self._shard(
            [np.broadcast_to(np.zeros((), x.dtype), x.shape[1:]) for x in self.arrays]
        )

    def _check_batch(self, size: int, what: str, *, split: bool = False) -> None:
        parts = 1 if self.batch_axis is None else self.mesh.shape[self.batch_axis]
        parts *= self.num_shards if split else 1
        if size % parts:
            raise ValueError(
                f"{size} {what} cannot be split into {parts} equal parts; pad them to "
                f"{-(-size // parts) * parts}"
            )


@functools.partial(jax.jit, static_argnums=4)
def _search(index: ShardedIndex, queries, plan, exclude, static) -> SearchResult:
    k, nprobe, exact = static
    batch = PartitionSpec(index.batch_axis)

    def local(arrays, queries, plan, exclude):
        shard = index._shard([x[0] for x in arrays])
        num_rows = shard.ivf.row_ids.shape[0]
        found = shard.search(
            queries, plan, k=min(k, num_rows), nprobe=nprobe, exact=exact, exclude=exclude
        )
        flat = SearchResult(*(x.reshape(-1, *x.shape[queries.ndim - 1 :]) for x in found))
        merged = _merge(flat, index.axis, k)
        return SearchResult(*(x.reshape(*queries.shape[:-1], *x.shape[1:]) for x in merged))

    return jax.shard_map(
        local,
        mesh=index.mesh,
        in_specs=(PartitionSpec(index.axis), batch, _plan_specs(plan, batch), batch),
        out_specs=batch,
        check_vma=False,  # an all-gather's result is the same everywhere, but not known to be
    )(index.arrays, queries, plan, exclude)


def _merge(found: SearchResult, axis: str, k: int) -> SearchResult:
    """The k best of all shards' results."""
    scores, ids = (lax.all_gather(x, axis, axis=1, tiled=True) for x in found[:2])
    room = ((0, 0), (0, max(0, k - ids.shape[1])))
    scores, places = lax.top_k(jnp.pad(scores, room, constant_values=-jnp.inf), k)
    ids = jnp.take_along_axis(jnp.pad(ids, room, constant_values=-1), places, axis=1)
    filled = jnp.sum(ids >= 0, axis=1, dtype=jnp.int32)
    proved = lax.pmin(found.exact.astype(jnp.int32), axis).astype(bool)
    return SearchResult(scores, ids, filled, proved)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _owned(index: ShardedIndex, ids, split: bool, method: str) -> Any:
    """What the shards' method gives for these ids, each from the shard that holds it."""
    batch = PartitionSpec(index.batch_axis)
    both = (index.axis,) if index.batch_axis is None else (index.batch_axis, index.axis)

    def total(values):
        # One shard holds the item and the others give zeros: the sum is exact in any dtype.
        summed = values.astype(jnp.int8) if values.dtype == bool else values
        if split:
            summed = lax.psum_scatter(summed, index.axis, scatter_dimension=0, tiled=True)
        else:
            summed = lax.psum(summed, index.axis)
        return summed.astype(values.dtype)

    def local(arrays, ids):
        shard = index._shard([x[0] for x in arrays])
        return jax.tree.map(total, getattr(shard, method)(ids))

    return jax.shard_map(
        local,
        mesh=index.mesh,
        in_specs=(PartitionSpec(index.axis), batch),
        out_specs=PartitionSpec(both) if split else batch,
        check_vma=False,
    )(index.arrays, ids)


def _plan_specs(plan: FilterPlan, batch: PartitionSpec) -> Any:
    """How a plan is split with its queries: programs that queries share are on all devices."""
    if plan.plan_of_query is None:
        return jax.tree.map(lambda _: batch, plan)
    return jax.tree.map(lambda _: PartitionSpec(), plan)._replace(plan_of_query=batch)


def _deal(
    index: ItemIndex, num_shards: int
) -> tuple[Int[np.ndarray, "S R"], Int32[np.ndarray, "C"]]:
    """(the row of `index` at each shard's row, -1 for padding; tiles of each list in a shard)."""
    ivf = index.ivf
    rows = np.flatnonzero(np.asarray(ivf.row_ids) >= 0)
    lists = list_of_row(ivf, rows)
    counts = np.bincount(lists, minlength=ivf.nlist)
    tiles = -(-counts // (num_shards * IVF_TILE_ROWS))
    tiles[-1] += tiles.sum() % 2  # as in the whole index
    starts = np.concatenate([[0], np.cumsum(tiles)]) * IVF_TILE_ROWS
    rank = np.arange(len(rows)) - (np.cumsum(counts) - counts)[lists]
    order = np.full((num_shards, starts[-1]), -1)
    order[rank % num_shards, starts[lists] + rank // num_shards] = rows
    return order, tiles.astype(np.int32)


def _shard(index: ItemIndex, order: Int[np.ndarray, "R"], list_tiles: np.ndarray) -> ItemIndex:
    """The index of these rows, -1 for none."""

    def take(values):
        values = np.asarray(values)
        taken = values[np.maximum(order, 0)]
        taken[order < 0] = 0
        return taken

    ivf = index.ivf
    row_ids = np.where(order >= 0, np.asarray(ivf.row_ids)[np.maximum(order, 0)], -1)
    rows = {name: take(getattr(ivf, name)) for name in ("codes", "scales", "vectors")}
    return replace(
        index,
        ivf=replace(
            ivf,
            **rows,
            row_ids=row_ids.astype(np.int32),
            id_order=np.argsort(row_ids, kind="stable").astype(np.int32),
            live=pack_bits(row_ids >= 0),
            tile_offsets=np.concatenate([[0], np.cumsum(list_tiles)]).astype(np.int32),
            # Static, so one number for all shards: an upper bound.
            num_items=len(order),
            list_tiles=list_tiles.tobytes(),
        ),
        bloom=index.bloom.reordered(order),
        columns={name: take(column) for name, column in index.columns.items()},
    )


def _same_shapes(shards: Sequence[ItemIndex]) -> list[ItemIndex]:
    """The shards with Bloom indexes of one shape: bit rows and terms that nothing points to are
    added at the end, and limits (most terms of an item) raised to the largest.
    """
    blooms = [shard.bloom for shard in shards]
    limits = {
        field.name: max(getattr(bloom, field.name) for bloom in blooms)
        for field in fields(BloomIndex)
        if isinstance(getattr(blooms[0], field.name), int | float)
    }
    leaves, layouts = zip(*(jax.tree.flatten(replace(b, **limits)) for b in blooms), strict=True)
    columns = [[np.asarray(x) for x in column] for column in zip(*leaves, strict=True)]
    padded = []
    for column in columns:
        length = max((len(x) for x in column if x.ndim), default=0)
        padded.append([_lengthened(x, length) for x in column])
    blooms = [
        jax.tree.unflatten(layout, arrays)
        for layout, arrays in zip(layouts, zip(*padded, strict=True), strict=True)
    ]
    return [replace(shard, bloom=bloom) for shard, bloom in zip(shards, blooms, strict=True)]


def _lengthened(array: np.ndarray, length: int) -> np.ndarray:
    if not array.ndim or len(array) == length:
        return array
    return np.pad(array, [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1))


def _place(stacked: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(stacked.shape, sharding, lambda at: stacked[at])
