"""Mixture-of-experts feed-forward networks."""

from pallas_kernels.moe.api import moe_ffn, saved_bytes
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.dispatch import Dispatch, moe_dispatch
from pallas_kernels.moe.memory import MoeMemory, MoeShape, moe_memory

__all__ = [
    "Dispatch",
    "MoeConfig",
    "MoeMemory",
    "MoeShape",
    "moe_dispatch",
    "moe_ffn",
    "moe_memory",
    "saved_bytes",
]
