"""See api.py."""

from pallas_kernels.softmax_attention.api import softmax_attention as softmax_attention
