"""Tile sizes of `ivf_search`."""

from dataclasses import dataclass

TILE_ROWS = 64
"""Rows of a tile: every list starts on a tile and its last tile is filled up with zero rows."""

MAX_K = 16_384
"""Most results a query may ask for."""

_BLOCK_BYTES = 4 << 20  # the scores of a block fit the caches of two CPU cores


@dataclass(frozen=True)
class IvfConfig:
    """How much the XLA backend holds at once.

    Attributes:
      query_block: queries scored together.
      row_block: rows scored together, a multiple of `TILE_ROWS`.
    """

    query_block: int
    row_block: int

    def __post_init__(self):
        if self.query_block < 1 or self.row_block < 1 or self.row_block % TILE_ROWS:
            raise ValueError(
                f"ivf_search: query_block {self.query_block} and row_block {self.row_block} must "
                f"be positive and row_block a multiple of {TILE_ROWS}"
            )

    @classmethod
    def heuristic(cls, num_queries: int, num_rows: int, *, shared: bool) -> "IvfConfig":
        """Blocks of about 4 MiB of scores.

        Args:
          num_queries: Q.
          num_rows: most rows that one query scores.
          shared: all queries score the same rows, so that a block holds scores of many.
        """
        query_block = max(1, min(num_queries, 128))
        rows = _BLOCK_BYTES // (4 * query_block) if shared else 1 << 14
        row_block = max(TILE_ROWS, min(rows, num_rows) // TILE_ROWS * TILE_ROWS)
        return cls(query_block, row_block)
