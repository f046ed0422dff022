"""From raw ids to table rows: by hashing, or by a map of known ids.

Letters: K known ids.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Int32

from jaxrec.typing import PADDING_ID
from pallas_kernels import bloom_row_hashes


def hash_ids(
    ids: Int[jax.Array | np.ndarray, "*shape"],
    num_rows: int,
    *,
    padding_id: int | None = PADDING_ID,
    seed: int = 0,
) -> Int32[jax.Array | np.ndarray, "*shape"]:
    """The hashing trick: any id to one of a table's rows; different ids may share a row.

    Row 0 is left to padding where `padding_id` is 0. Two tables with different seeds make other
    ids collide: the sum of both rows tells most ids apart.

    Args:
      ids: i32 or i64. A NumPy array is hashed on the host, a JAX array where it lies, also under
        jit, with the same result.
      num_rows: of the table.
      padding_id: stays what it is; None hashes every id.

    Raises:
      ValueError: too few rows to hash to.
    """
    first = 1 if padding_id == PADDING_ID else 0
    if num_rows <= first:
        raise ValueError(f"num_rows is {num_rows}; expected at least {first + 1}")
    if isinstance(ids, np.ndarray):
        words = np.ascontiguousarray(ids, np.int64)[..., None].view("<u4") ^ np.array(
            [0, seed], np.uint32
        )
        rows = bloom_row_hashes(words, 1)[..., 0] % np.uint32(num_rows - first)
        rows = rows.astype(np.int32) + first
        return rows if padding_id is None else np.where(ids == padding_id, padding_id, rows)
    sign = jnp.where(ids < 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    words = jnp.stack([ids.astype(jnp.uint32), sign ^ jnp.uint32(seed)], axis=-1)
    rows = bloom_row_hashes(words, 1)[..., 0] % jnp.uint32(num_rows - first)
    rows = rows.astype(jnp.int32) + first
    return rows if padding_id is None else jnp.where(ids == padding_id, padding_id, rows)


class IdMap:
    """Known raw ids, numbered from 1 in the order given; row 0 is padding. Host only."""

    def __init__(self, raw_ids: Int[np.ndarray, "K"]):
        """Takes the ids to number.

        Raises:
          ValueError: an id that comes twice.
        """
        raw_ids = np.asarray(raw_ids, np.int64)
        self._order = np.argsort(raw_ids, kind="stable")
        self._sorted = raw_ids[self._order]
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if twice.size:
            raise ValueError(f"the id {self._sorted[twice[0]]} comes twice; expected each id once")

    @property
    def num_rows(self) -> int:
        """Rows of a table for these ids and padding."""
        return len(self._sorted) + 1

    def rows(
        self, raw_ids: Int[np.ndarray, "*shape"], *, unknown: int | None = None
    ) -> Int32[np.ndarray, "*shape"]:
        """The number of each id.

        Args:
          raw_ids: any integers.
          unknown: row of ids that are not known, such as `PADDING_ID`; None raises.

        Raises:
          ValueError: an id that is not known.
        """
        raw_ids = np.asarray(raw_ids, np.int64)
        if not len(self._sorted):
            places, known = np.zeros(raw_ids.shape, np.int64), np.zeros(raw_ids.shape, bool)
        else:
            places = np.minimum(np.searchsorted(self._sorted, raw_ids), len(self._sorted) - 1)
            known = self._sorted[places] == raw_ids
            places = self._order[places]
        if unknown is None and not known.all():
            raise ValueError(
                f"the id {raw_ids[~known].flat[0]} is not among the {len(self._sorted)} known "
                f"ones ({(~known).sum()} such ids in all); map it with `unknown`, or leave it out"
            )
        return np.where(known, places + 1, 0 if unknown is None else unknown).astype(np.int32)
