"""Tile sizes of the MoE feed-forward network."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

type Fetch = Literal["gather", "fused"]

KERNEL_MULTIPLE = 128
"""D and H that the kernels take are multiples of this; others are filled up."""


@dataclass(frozen=True)
class MoeConfig:
    """Sizes that change speed and memory, never what is computed.

    Attributes:
      tile_rows: pairs of one expert that the XLA reference computes at once.
      programs: thread blocks of each kernel; 132 is one for each multiprocessor of an H200.
      shared_tiles: row tiles that a kernel takes through all columns before the next ones.
      fetch: how the kernels' forward pass gets rows of x to their experts: "gather" makes a copy of
        them by XLA, "fused" fetches them in the kernel. The bits are the same.
    """

    tile_rows: int = 128
    programs: int = 132
    shared_tiles: int = 8
    fetch: Fetch = "gather"

    def __post_init__(self):
        if self.fetch not in ("gather", "fused"):
            raise ValueError(f"MoeConfig.fetch is {self.fetch!r}; expected 'gather' or 'fused'")
        for name in ("tile_rows", "programs", "shared_tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"MoeConfig.{name} is {getattr(self, name)}; expected at least 1")

    @classmethod
    def heuristic(cls, num_pairs: int, num_experts: int) -> "MoeConfig":
        """Tiles about as large as an expert's share, 8 to 256, so that few are half empty."""
        share = max(1, num_pairs // max(1, num_experts))
        return cls(tile_rows=min(256, max(8, 1 << (share - 1).bit_length())))


def kernel_problem(x) -> str | None:
    """What keeps the kernels from this x, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}; the kernels multiply bfloat16 and float32"
    return None
