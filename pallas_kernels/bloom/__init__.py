"""Boolean filters over a bit-sliced Bloom index."""

from pallas_kernels.bloom.api import BloomMasks, bloom_search
from pallas_kernels.bloom.build import bloom_build, partition_width
from pallas_kernels.bloom.config import BloomConfig
from pallas_kernels.bloom.hash import mix64, row_hashes
from pallas_kernels.bloom.program import MAX_DEPTH, BloomOp, check_programs
from pallas_kernels.bloom.update import bloom_update

__all__ = [
    "MAX_DEPTH",
    "BloomConfig",
    "BloomMasks",
    "BloomOp",
    "bloom_build",
    "bloom_search",
    "bloom_update",
    "check_programs",
    "mix64",
    "partition_width",
    "row_hashes",
]
