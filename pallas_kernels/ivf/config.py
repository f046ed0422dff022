"""Tile sizes of `ivf_search`."""

from dataclasses import dataclass

TILE_ROWS = 64
"""Rows of a tile: every list starts on a tile and its last tile is filled up with zero rows."""

MAX_K = 16_384
"""Most results a query may ask for."""

_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class IvfConfig:
    """How much the XLA backend holds at once.

    Attributes:
      query_block: queries scored together.
      row_block: rows scored together, a multiple of `TILE_ROWS`; query_block · row_block scores
        exist at a time, and with lists probed also query_block · row_block · D gathered codes.
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
    def heuristic(cls, num_queries: int, num_rows: int, row_bytes: int) -> "IvfConfig":
        """Blocks of about 32 MiB.

        Args:
          num_queries: Q.
          num_rows: most rows that one query scores.
          row_bytes: bytes that one query holds for each row: 4 for its score, and the row's codes
            where each query gathers its own.
        """
        query_block = max(1, min(num_queries, 64))
        rows = _BLOCK_BYTES // (query_block * row_bytes)
        row_block = max(TILE_ROWS, min(rows, num_rows) // TILE_ROWS * TILE_ROWS)
        return cls(query_block, row_block)
