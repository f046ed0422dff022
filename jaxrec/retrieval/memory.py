"""What an item index takes in memory, before it is built."""

from typing import NamedTuple

import numpy as np

from jaxrec.retrieval.bloom_layout import bits_per_tail_term
from pallas_kernels import IVF_TILE_ROWS


class IndexBytes(NamedTuple):
    """Bytes of an `ItemIndex` by part.

    Attributes:
      codes: int8 rows and their scales.
      vectors: the rows for rescoring.
      bloom: bit rows, with the live bits.
      terms: the stored terms, by which uncertain items are verified.
      ids: item ids and their order.
      centroids: of the lists.
    """

    codes: int
    vectors: int
    bloom: int
    terms: int
    ids: int
    centroids: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self)


def index_bytes(
    num_items: int,
    width: int,
    *,
    nlist: int,
    head_values: int,
    tail_terms: float | int,
    terms: float | int,
    max_fpr: float = 1e-3,
    num_hashes: int = 5,
    vector_itemsize: int = 4,
) -> IndexBytes:
    """What `ItemIndex.build` will take for such a catalogue, without its columns; within a tenth.

    Lists end on tiles of 64 rows, so half a tile a list is padding (expected; at most a tile).

    Args:
      nlist: C, lists.
      head_values: values frequent enough for a row of their own: one bit an item each.
      tail_terms: other values of an item, mean.
      terms: values of an item, mean; 4.5 bytes each, and 8 an item.
      vector_itemsize: 4 for float32, 2 for bfloat16.
    """
    rows = num_items + nlist * IVF_TILE_ROWS // 2
    bits = head_values + tail_terms * bits_per_tail_term(max_fpr, num_hashes)
    return IndexBytes(
        codes=rows * (width + 4),
        vectors=rows * width * vector_itemsize,
        bloom=int(np.ceil(rows * (bits + 1) / 8)),
        terms=int(num_items * terms * 4 * 9 / 8 + rows * 8),
        ids=rows * 8 + rows // 8,
        centroids=nlist * (width + 1) * 4,
    )
