"""Named sizes of HSTU attention."""

from pallas_kernels._attention_workload import attention_workloads
from pallas_kernels.hstu_attention.api import hstu_attention

WORKLOADS = attention_workloads(hstu_attention)
