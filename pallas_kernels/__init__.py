"""GPU kernels for recommenders, each with an XLA reference."""

from pallas_kernels._backend import Backend, BackendError
from pallas_kernels.bloom import BloomMasks, BloomOp, bloom_build, bloom_search

__all__ = [
    "Backend",
    "BackendError",
    "BloomMasks",
    "BloomOp",
    "bloom_build",
    "bloom_search",
]
