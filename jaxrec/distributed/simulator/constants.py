"""Every number that goes into the simulator, with where it comes from."""

from dataclasses import dataclass, replace

from jaxrec.distributed.balance import HSTU_H100, CostModel

DENSE_COST = replace(HSTU_H100, per_token=HSTU_H100.per_token - 8.1e-8)


@dataclass(frozen=True)
class MachineConstants:
    """GPUs, eight a node, and what connects them. Bytes, seconds; see `SOURCES`."""

    gpus_per_node: int = 8
    nic: float = 25e9
    nvlink: float = 300e9
    pcie: float = 55e9
    hbm: float = 3.35e12
    gather_efficiency: float = 0.5
    latency: float = 20e-6
    latency_per_node: float = 2e-6
    sm_share: float = 24 / 132
    plan_per_sample: float = 1.7e-6
    jitter: float = 0.0


@dataclass(frozen=True)
class ModelConstants:
    """The model, its tables and its batches. Bytes, seconds; see `SOURCES`."""

    cost: CostModel = DENSE_COST
    per_step: float = 1.0e-3
    forward_share: float = 1 / 3
    dense_params: float = 42e6
    bytes_per_gradient: float = 4.0
    optimizer_bytes: float = 28.0
    buckets: int = 6
    width: int = 512
    bytes_per_value: float = 2.0
    unique_share: float = 0.7
    collisions: float = 0.12
    id_bytes: float = 8.0
    token_bytes: float = 12.0
    mask_bytes: float = 1.0


SOURCES = {
    "gpus_per_node": "HGX H100: eight GPUs on one NVSwitch",
    "nic": "FreeScale's cluster: 8 × 200 Gb/s InfiniBand a node, so 25 GB/s a GPU",
    "nvlink": "FreeScale's cluster: 600 GB/s NVSwitch, half of it in each direction",
    "pcie": "PCIe 5 ×16: 63 GB/s less its packet headers (assumed 87 %)",
    "hbm": "H100 SXM data sheet: 3.35 TB/s",
    "gather_efficiency": "assumed: rows of 1 KiB reach half of the copy bandwidth",
    "latency": "assumed: start of a NCCL collective across nodes",
    "latency_per_node": "assumed: each further node that an all-to-all has messages for",
    "sm_share": "NCCLX all-gather took 24 SMs before it was made SM-free; an H100 has 132",
    "plan_per_sample": "measured: 8.5 to 13.5 ms for 8,192 samples on 256 ranks on one CPU "
    "core; the worst",
    "jitter": "0: only what lengths and communication cause; its effect is in the sensitivity",
    "cost": "recsys-examples' profile of 8 layers, width 1024 (balance.HSTU_H100), less the 5.7 % "
    "of its step that are embeddings, which are ops of their own here",
    "per_step": "assumed: launches and synchronisation of a step, whatever its size",
    "forward_share": "TorchRec's planner: backward takes twice as long as forward",
    "dense_params": "8 layers × (4 + 1) × 1024², from recsys-examples' model",
    "bytes_per_gradient": "fp32 gradients",
    "optimizer_bytes": "Adam in fp32 reads weight, gradient and two moments and writes three",
    "buckets": "168 MB in buckets of XLA's combine threshold, 30 MB",
    "width": "assumed: the published experiments do not state it",
    "bytes_per_value": "bf16 rows and gradients on the wire",
    "unique_share": "assumed: share of a rank's tokens left after duplicates are removed",
    "collisions": "FreeScale: 12 % in one account, low single digits in another; the worse one",
    "id_bytes": "64-bit ids",
    "token_bytes": "an item, a time and a target in 32 bits each",
    "mask_bytes": "one bool an id, each way",
}

ASSUMED = tuple(name for name, source in SOURCES.items() if "assumed" in source)
"""Constants that nobody published or measured: look at the sensitivity to them first."""
