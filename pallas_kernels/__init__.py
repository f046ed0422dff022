"""GPU kernels for recommenders, each with an XLA reference that defines what is correct."""

from pallas_kernels._backend import Backend, BackendError
from pallas_kernels.bloom import BloomMasks, BloomOp, bloom_build, bloom_search
from pallas_kernels.hstu_attention import hstu_attention
from pallas_kernels.softmax_attention import softmax_attention

__all__ = [
    "Backend",
    "BackendError",
    "BloomMasks",
    "BloomOp",
    "bloom_build",
    "bloom_search",
    "hstu_attention",
    "softmax_attention",
]
