"""Tile sizes of `ivf_search`."""

from dataclasses import dataclass, replace

TILE_ROWS = 64
"""Rows of a tile: every list starts on a tile and its last tile is filled up with zero rows."""

MAX_K = 16_384
"""Most results a query may ask for."""

_BLOCK_BYTES = 4 << 20  # the scores of a block fit the caches of two CPU cores

BLOCK_QUERIES = (8, 16, 32, 64)
SLOT_TILES = (16, 32, 64, 128)  # masks of 16 tiles fill the smallest copy, 128 bytes
MAX_BLOCK_KEPT = 128  # 64 registers a thread for what lanes keep; more would spill
MAX_SMEM_BYTES = 224 << 10
HALF_SMEM_BYTES = 112 << 10  # two programs a multiprocessor: one computes while the other waits
KEPT = (2, 4, 6, 8, 16)
SORT_COST_BYTES = 400  # bytes scanned in the time that a key takes to sort; an estimate
TYPICAL_SHARE_OF_BOUND = 0.7  # tiles that a query scans, of the tiles of the largest lists
FEW = 8  # a batch that scans at most this part of the lists and tiles has a program of its own
SCRATCH_BYTES = 40 << 20
SHARING_QUERY_BYTES = 1 << 20  # most scratch of a query, for it to share lists with others
SHARING_SCRATCH_BYTES = 512 << 20  # groups share no lists, so they are larger there
BUSY_PROGRAMS = 528  # four programs on each of 132 multiprocessors


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


@dataclass(frozen=True)
class IvfKernelConfig:
    """Tiles of the Mosaic GPU kernel.

    Attributes:
      block_queries: queries that share a program, the columns of its matrix product: 8, 16, 32, 64.
      slot_tiles: tiles that a program scans: a power of two, 16 to 128. Each of its 64 lanes sees
        one row of each, and passes on `kept` of them.
      kept: best rows that a lane keeps; they take block_queries · kept / 2 registers of a thread.
      stages: tiles in flight to shared memory.
      share: list-major: queries of a batch that probe the same list share programs. Otherwise
        query-major: every query has its own, which deal its tiles out among their lanes.
      max_scratch_bytes: work whose slots take more is cut in groups of queries or parts of the
        rows, one after the other.
    """

    block_queries: int = 8
    slot_tiles: int = 64
    kept: int = 8
    stages: int = 4
    share: bool = False
    max_scratch_bytes: int = SCRATCH_BYTES

    @property
    def tag_mask(self) -> int:
        """Lowest bits of a key, which hold the number of a tile among its slot's."""
        return self.slot_tiles - 1

    def smem_bytes(self, width: int) -> int:
        """Shared memory of one program for rows of `width`, but for its barriers."""
        tiles, words = self.stages * TILE_ROWS * (width + 4), 8 * self.slot_tiles
        return tiles + self.block_queries * (width + words + 256 * self.kept) + words

    def slot_bytes(self, width: int) -> int:
        """Scratch for each slot: survivors and their sort, mask words, tiles, codes of queries."""
        survivors, tiles = self.kept * TILE_ROWS, self.slot_tiles
        return 12 * survivors + (16 + 4) * tiles + width * (1 if self.share else self.block_queries)

    def distinct_slots(self, num_lists: int, num_tiles: int, max_list_tiles: int | None) -> int:
        """Most slots that a list-major search can cut the lists of an index in."""
        cut = num_tiles // self.slot_tiles + num_lists
        return cut if max_list_tiles is None else min(cut, num_lists * self.slots(max_list_tiles))

    def slots(self, num_tiles: int) -> int:
        """Slots that tiles in a row are cut in."""
        return -(-num_tiles // self.slot_tiles)

    def num_programs(self, num_slots: int, distinct: int) -> int:
        """Static size of the grid: most programs that slots of `distinct` tile lists can need."""
        if not self.share:
            return num_slots
        return min(num_slots, num_slots // self.block_queries + distinct)


def max_slots(
    nprobe: int,
    max_tiles: int,
    config: IvfKernelConfig,
    *,
    strided: bool,
    max_list_tiles: int | None = None,
) -> int:
    """Slots of a query of any `nprobe` lists, of `max_tiles` tiles together.

    Args:
      nprobe: lists.
      max_tiles: static bound on their tiles.
      config: tiles of a slot.
      strided: tiles of all lists are dealt out; otherwise the last slot of each list may be short.
      max_list_tiles: static bound on the tiles of one list.
    """
    length = config.slot_tiles
    if strided:
        return max(1, config.slots(max_tiles))
    of_list = config.slots(max_list_tiles or max_tiles)
    return max(1, min(max_tiles, nprobe * of_list, (max_tiles + nprobe * (length - 1)) // length))


def num_fetched(k: int, num_survivors: int) -> int:
    """Survivors of a query that are scored again: some more than k, as their keys are rounded."""
    return min(k + k // 16 + 32, num_survivors)


def sorted_keys(num_survivors: int, kept: int, fetched: int) -> int:
    """Keys of a query that are sorted: the first of each lane, then all of `fetched` lanes.

    Or all at once, where that is less.
    """
    return min(num_survivors, num_survivors // kept + fetched * kept)


def group_queries(num_slots: int, width: int, config: IvfKernelConfig) -> int:
    """Queries of `num_slots` slots whose scratch may exist together; at least one.

    Args:
      num_slots: of a query.
      width: of the codes.
      config: tiles and `max_scratch_bytes`.
    """
    return max(1, config.max_scratch_bytes // (num_slots * config.slot_bytes(width)))


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
    if config.block_queries not in BLOCK_QUERIES or config.slot_tiles not in SLOT_TILES:
        return (
            f"block_queries={config.block_queries}, slot_tiles={config.slot_tiles}; "
            f"they need one of {BLOCK_QUERIES} and of {SLOT_TILES}"
        )
    if config.kept < 1 or config.block_queries * config.kept > MAX_BLOCK_KEPT or config.stages < 2:
        return (
            f"kept={config.kept}, stages={config.stages}; they need 1 to "
            f"{MAX_BLOCK_KEPT // config.block_queries}, and 2 or more"
        )
    if config.smem_bytes(width) > MAX_SMEM_BYTES:
        return (
            f"{config.smem_bytes(width)} bytes of shared memory; a program may use "
            f"{MAX_SMEM_BYTES}: take fewer stages or tiles a slot"
        )
    return None


def kernel_heuristic(
    num_queries: int,
    num_lists: int,
    nprobe: int,
    max_tiles: int,
    k: int,
    codes_shape: tuple[int, ...],
    *,
    max_list_tiles: int | None = None,
    probes_vary: bool = False,
) -> IvfKernelConfig:
    """Tiles chosen from shapes alone: of all that fit, those that cost least.

    - The cost of a query is the bytes that it scans, over the queries that share them, its masks
      and survivors, written and read, and 400 bytes for each key that is sorted: XLA sorts some
      10 G keys a second while the memory delivers 4 TB (an estimate).
    - A lane keeps the winners that it can expect and three standard deviations more. In lists that
      are shared winners cluster: they are taken to lie in two lists, and two deviations allowed.
    - A query that shares lists takes little scratch, so that hundreds need not be cut in groups.
    - Programs are many enough to fill the GPU if they can be; few have more tiles in flight.
    """
    num_rows, width = codes_shape
    full = nprobe == num_lists and not probes_vary
    scanned = num_rows if full else max_tiles * TILE_ROWS * TYPICAL_SHARE_OF_BOUND
    tiles = num_rows // TILE_ROWS if full else max_tiles
    meeting = _queries_per_list(num_queries, num_lists, nprobe)
    keep_all = IvfKernelConfig(BLOCK_QUERIES[0], SLOT_TILES[0], SLOT_TILES[0], stages=2)
    fits_twice = keep_all.smem_bytes(width) <= HALF_SMEM_BYTES
    smem_limit = HALF_SMEM_BYTES if fits_twice else MAX_SMEM_BYTES

    def sharing(config: IvfKernelConfig) -> float:
        return max(1.0, min(meeting, config.block_queries / 1.5)) if config.share else 1.0

    def slots(config: IvfKernelConfig) -> int:
        strided = full or not config.share
        return max_slots(nprobe, tiles, config, strided=strided, max_list_tiles=max_list_tiles)

    def fits(config: IvfKernelConfig) -> bool:
        clustered = config.share and not full
        scratch = slots(config) * config.slot_bytes(width) if clustered else 0
        rows = 2 * num_rows / num_lists if clustered else scanned
        seen = min(config.slot_tiles, -(-max_tiles // nprobe)) if clustered else config.slot_tiles
        expected = min(1, k / max(rows, 1)) * seen
        wanted = 1 + expected + (2 if clustered else 3) * expected**0.5
        programs = num_queries * tiles / config.slot_tiles / sharing(config)
        return (
            config.kept >= min(wanted, config.slot_tiles)
            and scratch <= SHARING_QUERY_BYTES
            and config.block_queries * config.kept <= MAX_BLOCK_KEPT
            and replace(config, stages=2).smem_bytes(width) <= smem_limit
            and (programs >= BUSY_PROGRAMS or config.slot_tiles == SLOT_TILES[0])
        )

    def cost(config: IvfKernelConfig) -> float:
        survivors = slots(config) * TILE_ROWS * config.kept
        in_order = sorted_keys(survivors, config.kept, num_fetched(k, survivors))
        copies = 1 if config.share and not full else 3  # in place, or gathered: read, written, read
        masks = 8 * slots(config) * config.slot_tiles * copies
        scan = scanned * (width + 4) / sharing(config) + masks
        return scan + 8 * survivors + SORT_COST_BYTES * in_order

    every = [
        IvfKernelConfig(block, length, kept, 4, share)
        for block, share in [(BLOCK_QUERIES[0], False), *((n, True) for n in BLOCK_QUERIES)]
        for length in SLOT_TILES
        for kept in KEPT
    ]
    fitting = [config for config in every if fits(config)]
    best = min(fitting, key=lambda config: (cost(config), config.kept), default=keep_all)
    few = num_queries * tiles < best.slot_tiles * BUSY_PROGRAMS * sharing(best)
    stages = 8 if few else 4
    while stages > 2 and replace(best, stages=stages).smem_bytes(width) > smem_limit:
        stages -= 1
    scratch = SHARING_SCRATCH_BYTES if best.share and not full else SCRATCH_BYTES
    return replace(best, stages=stages, max_scratch_bytes=scratch)


def _queries_per_list(num_queries: int, num_lists: int, nprobe: int) -> float:
    """Queries that probe a list, on average over the probed, if they chose at random."""
    probed = 1 - (1 - nprobe / max(num_lists, 1)) ** num_queries
    return num_queries * nprobe / max(num_lists * probed, 1e-9)


def search_space() -> list[IvfKernelConfig]:
    """Every choice worth timing; `kernel_problem` tells which a given width allows."""
    scratch = {True: SHARING_SCRATCH_BYTES, False: SCRATCH_BYTES}
    return [
        IvfKernelConfig(block, length, kept, stages, share, scratch[share])
        for block in BLOCK_QUERIES
        for length in SLOT_TILES
        for kept in KEPT[:4]
        for stages in (4, 8)
        for share in (True, False)
        if block * kept <= MAX_BLOCK_KEPT and (share or block == BLOCK_QUERIES[0])
    ]
