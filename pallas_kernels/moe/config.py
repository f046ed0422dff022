"""Tile sizes of the MoE feed-forward network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoeConfig:
    """Sizes that change speed and memory, never what is computed.

    Attributes:
      tile_rows: pairs of one expert that the XLA reference computes at once.
    """

    tile_rows: int = 128

    def __post_init__(self):
        if self.tile_rows < 1:
            raise ValueError(f"MoeConfig.tile_rows is {self.tile_rows}; expected at least 1")

    @classmethod
    def heuristic(cls, num_pairs: int, num_experts: int) -> "MoeConfig":
        """Tiles about as large as an expert's share, 8 to 256, so that few are half empty."""
        share = max(1, num_pairs // max(1, num_experts))
        return cls(tile_rows=min(256, max(8, 1 << (share - 1).bit_length())))
