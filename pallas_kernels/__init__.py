"""GPU kernels for recommenders, each with an XLA reference."""

from pallas_kernels._backend import Backend, BackendError
from pallas_kernels.bloom import BloomMasks, BloomOp, bloom_build, bloom_search
from pallas_kernels.ivf import (
    MAX_K,
    TILE_ROWS,
    IvfTopK,
    ivf_search,
    probed_tiles_bound,
    quantise,
    rescore,
)

__all__ = [
    "MAX_K",
    "TILE_ROWS",
    "Backend",
    "BackendError",
    "BloomMasks",
    "BloomOp",
    "IvfTopK",
    "bloom_build",
    "bloom_search",
    "ivf_search",
    "probed_tiles_bound",
    "quantise",
    "rescore",
]
