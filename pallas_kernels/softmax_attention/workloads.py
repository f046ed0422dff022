"""Named sizes of softmax attention."""

from pallas_kernels._attention_workload import attention_workloads
from pallas_kernels.softmax_attention.api import softmax_attention

WORKLOADS = attention_workloads(softmax_attention)
