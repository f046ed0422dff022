"""Tiles of the Bloom kernel: what may be chosen, what is chosen untuned, what is supported."""

from dataclasses import dataclass

from pallas_kernels.bloom.program import MAX_DEPTH

WARPGROUP = 128
MAX_GRID_Y = 65_535
_SMEM_BYTES = 227 * 1024


@dataclass(frozen=True)
class BloomConfig:
    """Tiles of the kernel.

    Attributes:
      block_words: words of one program's tile; a multiple of 128 that divides W. 512 gives each
        thread one 16-byte load a row, and a stack of 32 KB, so seven programs fit an SM.
    """

    block_words: int = 512

    @property
    def stack_bytes(self) -> int:
        """Shared memory of one program: MAX_DEPTH pairs of tiles."""
        return MAX_DEPTH * 2 * self.block_words * 4


def heuristic(bundle_words: int) -> BloomConfig:
    """The widest tile of at most 512 words that divides a bundle of `bundle_words`."""
    fitting = [words for words in (512, 256) if bundle_words % words == 0]
    return BloomConfig(block_words=fitting[0] if fitting else WARPGROUP)


def search_space(bundle_words: int) -> list[BloomConfig]:
    """Every tile worth timing for bundles of `bundle_words`."""
    return [BloomConfig(words) for words in (128, 256, 512, 1024) if bundle_words % words == 0]


def kernel_problem(
    rows_shape: tuple[int, ...], opcodes_shape: tuple[int, ...], config: BloomConfig
) -> str | None:
    """What keeps the kernel from these shapes, or None."""
    num_rows, width = rows_shape
    if width % WARPGROUP:
        return f"bundles of {width} words; the kernel needs a multiple of {WARPGROUP}"
    if config.block_words % WARPGROUP or width % config.block_words:
        return (
            f"block_words={config.block_words}; it needs a multiple of {WARPGROUP} "
            f"that divides the bundle's {width} words"
        )
    if config.stack_bytes > _SMEM_BYTES:
        return f"block_words={config.block_words} needs {config.stack_bytes} bytes of shared memory"
    if num_rows == 0 or opcodes_shape[0] == 0:
        return "an index without rows, or no queries"
    return None
