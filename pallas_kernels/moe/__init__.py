"""Mixture-of-experts feed-forward networks."""

from pallas_kernels.moe.api import moe_ffn, saved_bytes
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.dispatch import Dispatch, moe_dispatch

__all__ = ["Dispatch", "MoeConfig", "moe_dispatch", "moe_ffn", "saved_bytes"]
