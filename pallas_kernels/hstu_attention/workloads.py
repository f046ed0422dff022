"""Named sizes of HSTU attention."""

from pallas_kernels._attention_workload import AttentionWorkload, attention_workloads
from pallas_kernels.hstu_attention.api import hstu_attention

WORKLOADS = attention_workloads(hstu_attention) | {
    # The kernels take it too.
    "tiny": AttentionWorkload(hstu_attention, 96, 7, max_len=30, heads=2, width=32),
}
