"""Masked inverted-file search over int8 codes."""

from pallas_kernels.ivf.api import IvfTopK, ivf_search
from pallas_kernels.ivf.config import MAX_K, TILE_ROWS, IvfConfig, IvfKernelConfig
from pallas_kernels.ivf.ref import probed_tiles_bound, quantise, rescore

__all__ = [
    "MAX_K",
    "TILE_ROWS",
    "IvfConfig",
    "IvfKernelConfig",
    "IvfTopK",
    "ivf_search",
    "probed_tiles_bound",
    "quantise",
    "rescore",
]
