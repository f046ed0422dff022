"""See api.py."""

from pallas_kernels.hstu_attention.api import hstu_attention as hstu_attention
from pallas_kernels.hstu_attention.cached import hstu_attention_cached as hstu_attention_cached
from pallas_kernels.hstu_attention.config import HstuConfig as HstuConfig
