"""GPU kernels for recommenders, each with an XLA reference that defines what is correct."""

from pallas_kernels.hstu_attention import hstu_attention as hstu_attention
from pallas_kernels.softmax_attention import softmax_attention as softmax_attention
