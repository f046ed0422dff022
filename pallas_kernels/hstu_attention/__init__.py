"""See api.py."""

from pallas_kernels.hstu_attention.api import hstu_attention as hstu_attention
