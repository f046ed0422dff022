"""GPU kernels for recommenders, each with an XLA reference that defines what is correct."""

from pallas_kernels._backend import Backend, BackendError, tuned_file
from pallas_kernels.bloom import MAX_DEPTH as BLOOM_MAX_DEPTH
from pallas_kernels.bloom import BloomMasks, BloomOp, bloom_build, bloom_search, bloom_update, mix64
from pallas_kernels.bloom import row_hashes as bloom_row_hashes
from pallas_kernels.hstu_attention import hstu_attention, hstu_attention_cached
from pallas_kernels.ivf import MAX_K as IVF_MAX_K
from pallas_kernels.ivf import TILE_ROWS as IVF_TILE_ROWS
from pallas_kernels.ivf import IvfTopK, ivf_search, probed_tiles_bound, quantise, rescore
from pallas_kernels.moe import Dispatch, MoeMemory, MoeShape, moe_dispatch, moe_ffn, moe_memory
from pallas_kernels.moe import saved_bytes as moe_saved_bytes
from pallas_kernels.softmax_attention import softmax_attention

__all__ = [
    "BLOOM_MAX_DEPTH",
    "IVF_MAX_K",
    "IVF_TILE_ROWS",
    "Backend",
    "BackendError",
    "BloomMasks",
    "BloomOp",
    "Dispatch",
    "IvfTopK",
    "MoeMemory",
    "MoeShape",
    "bloom_build",
    "bloom_row_hashes",
    "bloom_search",
    "bloom_update",
    "hstu_attention",
    "hstu_attention_cached",
    "ivf_search",
    "mix64",
    "moe_dispatch",
    "moe_ffn",
    "moe_memory",
    "moe_saved_bytes",
    "probed_tiles_bound",
    "quantise",
    "rescore",
    "softmax_attention",
    "tuned_file",
]
