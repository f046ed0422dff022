"""Tiles of the Bloom kernel: what may be chosen, what is chosen untuned, what is supported."""

from dataclasses import dataclass

from pallas_kernels.bloom.program import MAX_DEPTH

WARPGROUP = 128
STACK_SLOTS = MAX_DEPTH - 1  # the topmost pair is in registers
MAX_BLOCK_WORDS = 1024  # wider tiles leave room for two programs an SM
MAX_GRID_Y = 65_535


@dataclass(frozen=True)
class BloomConfig:
    """Tiles of the kernel.

    Attributes:
      block_words: words of one program's tile; a multiple of 128, up to 1024, that divides W.
        512 gives each thread one 16-byte load a row and a stack of 28 KB, so that seven programs
        fit an SM.
    """

    block_words: int = 512

    @property
    def stack_bytes(self) -> int:
        """Shared memory of one program."""
        return STACK_SLOTS * 2 * self.block_words * 4


def heuristic(tile_words: int) -> BloomConfig:
    """The widest block of at most 512 words that divides a tile or bundle of `tile_words`."""
    fitting = [words for words in (512, 256) if tile_words % words == 0]
    return BloomConfig(block_words=fitting[0] if fitting else WARPGROUP)


def search_space(bundle_words: int) -> list[BloomConfig]:
    """Every tile worth timing for bundles of `bundle_words`."""
    return [BloomConfig(words) for words in (128, 256, 512, 1024) if bundle_words % words == 0]


def kernel_problem(
    rows_shape: tuple[int, ...],
    num_tiles: int,
    num_queries: int,
    config: BloomConfig,
    *,
    tile_words: int | None = None,
) -> str | None:
    """What keeps the kernel from `num_tiles` tiles a query (None: whole bundles), or None."""
    num_rows, width = rows_shape
    block = config.block_words
    unit = "bundles" if tile_words in (None, width) else "tiles"
    tile = width if tile_words is None else tile_words
    if tile % WARPGROUP:
        return f"{unit} of {tile} words; the kernel needs a multiple of {WARPGROUP}"
    if block % WARPGROUP or not WARPGROUP <= block <= MAX_BLOCK_WORDS or tile % block:
        return (
            f"block_words={block}; it needs a multiple of {WARPGROUP}, up to {MAX_BLOCK_WORDS}, "
            f"that divides {unit} of {tile} words"
        )
    if num_rows == 0 or num_tiles == 0 or num_queries == 0:
        return "an index without rows or bundles, or no queries"
    if num_tiles * (tile // block) > MAX_GRID_Y:
        return (
            f"more than {MAX_GRID_Y} blocks of {block} words; use a larger block_words, or shards"
        )
    return None
