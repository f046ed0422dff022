"""Tile sizes of `ivf_search`."""

from dataclasses import dataclass, replace

TILE_ROWS = 64
"""Rows of a tile: every list starts on a tile and its last tile is filled up with zero rows."""

MAX_K = 16_384
"""Most results a query may ask for."""

_BLOCK_BYTES = 32 << 20
_SURVIVOR_BYTES = 16 << 20

BLOCK_QUERIES = (8, 16, 32, 64)
SEGMENT_TILES = (16, 32, 64, 128)  # masks of 16 tiles fill the smallest copy, 128 bytes
MAX_BLOCK_KEPT = 128  # 64 registers a thread for what lanes keep; more would spill
MAX_SMEM_BYTES = 220 << 10
MIN_SHARING = 1.1  # queries a probed list below which bringing them together is not worth a sort


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


@dataclass(frozen=True)
class IvfKernelConfig:
    """Tiles of the Mosaic GPU kernel.

    Attributes:
      block_queries: queries that share a program, the columns of its matrix product: 8, 16, 32, 64.
      segment_tiles: tiles that a program scans: a power of two, 8 to 128. Each of its 64 lanes sees
        one row of each, and passes on `kept` of them.
      kept: best rows that a lane keeps; all lanes of a program hold block_queries · kept registers
        a thread and four.
      stages: tiles in flight to shared memory.
      share: list-major: queries of a batch that probe the same list share its programs. Otherwise
        every query has its own, which saves the sort that brings them together.
    """

    block_queries: int = 8
    segment_tiles: int = 32
    kept: int = 8
    stages: int = 4
    share: bool = True

    @property
    def tag_mask(self) -> int:
        """Lowest bits of a key, which hold the number of the tile in its segment."""
        return self.segment_tiles - 1

    def smem_bytes(self, width: int) -> int:
        """Shared memory of one program for rows of `width`, but for its barriers."""
        tiles = self.stages * TILE_ROWS * (width + 4)
        return tiles + self.block_queries * (width + 8 * self.segment_tiles + 256 * self.kept)

    def num_programs(self, num_slots: int, num_lists: int, num_rows: int) -> int:
        """Most programs that `num_slots` slots can need: the static size of the grid."""
        if not self.share:
            return num_slots
        segments = num_rows // TILE_ROWS // self.segment_tiles + num_lists
        return min(num_slots, num_slots // self.block_queries + segments)


def max_slots(nprobe: int, max_tiles: int, config: IvfKernelConfig) -> int:
    """Segments of any `nprobe` lists of `max_tiles` tiles together, each list's last one short."""
    length = config.segment_tiles
    return max(1, min(max_tiles, (max_tiles + nprobe * (length - 1)) // length))


def group_queries(num_slots: int, config: IvfKernelConfig) -> int:
    """Queries whose survivors fill about 16 MiB; more are searched one group after the other."""
    return max(1, _SURVIVOR_BYTES // (num_slots * config.kept * TILE_ROWS * 4))


def kernel_problem(
    codes_shape: tuple[int, ...],
    codes_dtype: str,
    num_queries: int,
    config: "IvfConfig | IvfKernelConfig",
) -> str | None:
    """What keeps the kernel from these shapes, or None."""
    num_rows, width = codes_shape
    if isinstance(config, IvfConfig):
        return "an IvfConfig is for the XLA backend; the kernel takes an IvfKernelConfig"
    if codes_dtype != "int8":
        return f"codes of {codes_dtype}; the kernel scores int8"
    if width % 32:
        return f"rows of {width} codes; the kernel needs a multiple of 32"
    if num_rows == 0 or num_queries == 0:
        return "no rows or no queries"
    if config.block_queries not in BLOCK_QUERIES or config.segment_tiles not in SEGMENT_TILES:
        return (
            f"block_queries={config.block_queries}, segment_tiles={config.segment_tiles}; "
            f"they need one of {BLOCK_QUERIES} and of {SEGMENT_TILES}"
        )
    if config.kept < 1 or config.block_queries * config.kept > MAX_BLOCK_KEPT or config.stages < 2:
        return (
            f"kept={config.kept}, stages={config.stages}; they need 1 to "
            f"{MAX_BLOCK_KEPT // config.block_queries}, and 2 or more"
        )
    if config.smem_bytes(width) > MAX_SMEM_BYTES:
        return (
            f"{config.smem_bytes(width)} bytes of shared memory; a program may use "
            f"{MAX_SMEM_BYTES}: take fewer stages or shorter segments"
        )
    return None


def kernel_heuristic(
    num_queries: int,
    num_lists: int,
    nprobe: int,
    k: int,
    codes_shape: tuple[int, ...],
) -> IvfKernelConfig:
    """Tiles chosen from shapes alone.

    - Lists are shared if queries of a batch that probe at random would meet in them: a program then
      takes up to 1.5 times the queries that a probed list has on average.
    - The k winners are taken to lie in four lists (they cluster, as lists do). Segments are as long
      as lets a lane's share of them, plus two standard deviations, fit what it keeps.
    """
    num_rows, width = codes_shape
    probed = 1 - (1 - nprobe / max(num_lists, 1)) ** num_queries
    meeting = num_queries * nprobe / max(num_lists * probed, 1e-9)
    share = num_queries > 1 and meeting > MIN_SHARING
    wanted = next((n for n in BLOCK_QUERIES if n >= 1.5 * meeting), BLOCK_QUERIES[-1])
    density = min(0.5, k * num_lists / (4 * max(num_rows, 1)))
    for block in [n for n in reversed(BLOCK_QUERIES) if n <= wanted] if share else [8]:
        kept = min(8, MAX_BLOCK_KEPT // block)
        fitting = [t for t in SEGMENT_TILES if density * t + 2 * (density * t) ** 0.5 <= kept]
        if fitting or block == BLOCK_QUERIES[0]:
            break
    length = fitting[-1] if fitting else SEGMENT_TILES[0]
    config = IvfKernelConfig(block, length, kept, 4, share)
    while config.smem_bytes(width) > MAX_SMEM_BYTES and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    return config


def search_space() -> list[IvfKernelConfig]:
    """Every choice worth timing; `kernel_problem` tells which a given width allows."""
    return [
        IvfKernelConfig(block, length, kept, stages, share)
        for block in BLOCK_QUERIES
        for length in SEGMENT_TILES[1:]
        for kept in (2, 4, 8)
        for stages in (4, 6)
        for share in (True, False)
        if block * kept <= MAX_BLOCK_KEPT and (share or block == BLOCK_QUERIES[0])
    ]
