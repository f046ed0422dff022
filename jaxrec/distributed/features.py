"""What a batch asks of embedding tables: ids, and how the rows of several become one.

Letters: B examples, G parts of a packed batch, T ids of a part, D width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxrec.ops.row_runs import sum_bags


class Bags(NamedTuple):
    """Sets of ids of any size, of which each is pooled to one row.

    Attributes:
      ids: packed, as in `JaggedBatch`; i32[G, T]. G is the number of devices or a multiple.
      offsets: bag b of part g is its ids offsets[g, b] up to offsets[g, b + 1]; i32[G, B + 1].
    """

    ids: Int[jax.Array | np.ndarray, "G T"]
    offsets: Int[jax.Array | np.ndarray, "G B1"]


type Ids = Int[jax.Array | np.ndarray, "B *shape"] | Bags


@dataclass(frozen=True)
class Feature:
    """Something that names rows of a table.

    Attributes:
      table: whose rows.
      pooling: None gives each id its row; "sum" or "mean" gives one row for all ids of an example
        (along all axes but the first) or of a bag. A mean is over ids that have a row: no padding.
    """

    table: str
    pooling: Literal["sum", "mean"] | None = None

    def __post_init__(self):
        if self.pooling not in (None, "sum", "mean"):
            raise ValueError(
                f"pooling of a feature of table {self.table!r} is {self.pooling!r}; expected None, "
                "sum or mean"
            )


def shape_of(ids: Ids) -> tuple[int, ...]:
    """The shape of a feature's ids; its first axis is split over devices."""
    return np.shape(ids.ids if isinstance(ids, Bags) else ids)


def flat_ids(ids: Ids) -> Int32[Array, "N"]:
    """All ids of a feature, one after the other."""
    return jnp.asarray(ids.ids if isinstance(ids, Bags) else ids).reshape(-1).astype(jnp.int32)


def pool(
    rows: Float[Array, "N D"], have_row: Bool[Array, "N"], ids: Ids, pooling: str | None
) -> Float[Array, "*pooled D"]:
    """A feature's rows in the shape of its ids, or pooled; sums are f32's.

    Args:
      rows: of the flat ids, zeros where there is none.
      have_row: whether there is one.
      ids, pooling: of the feature.
    """
    shape = shape_of(ids)
    rows, have_row = rows.reshape(*shape, rows.shape[-1]), have_row.reshape(shape)
    if pooling is None:
        return rows
    count = have_row.astype(jnp.float32)[..., None]
    if isinstance(ids, Bags):
        total = jax.vmap(sum_bags)(rows.astype(jnp.float32), ids.offsets)
        count = jax.vmap(sum_bags)(count, ids.offsets)
    else:
        axes = tuple(range(1, len(shape)))
        total, count = jnp.sum(rows.astype(jnp.float32), axes), jnp.sum(count, axes)
    pooled = total / jnp.maximum(count, 1) if pooling == "mean" else total
    return pooled.astype(rows.dtype)
