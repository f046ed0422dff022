"""Boolean filters over a bit-sliced Bloom index."""

from pallas_kernels.bloom.api import BloomMasks, bloom_search
from pallas_kernels.bloom.build import bloom_build, partition_width
from pallas_kernels.bloom.config import BloomConfig
from pallas_kernels.bloom.program import MAX_DEPTH, BloomOp, check_programs

__all__ = [
    "MAX_DEPTH",
    "BloomConfig",
    "BloomMasks",
    "BloomOp",
    "bloom_build",
    "bloom_search",
    "check_programs",
    "partition_width",
]
