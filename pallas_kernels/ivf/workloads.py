"""Named sizes of IVF searches."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.ivf.config import TILE_ROWS


@dataclass(frozen=True)
class IvfWorkload:
    """Random unit rows in `num_lists` lists whose lengths vary by up to half of their mean."""

    num_rows: int
    width: int
    num_lists: int
    nprobe: int
    k: int
    num_queries: int
    selectivity: float = 1.0

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """The array arguments of `ivf_search`; the mask lets `selectivity` of the rows pass."""
        rng = np.random.default_rng(seed)
        share = rng.uniform(0.5, 1.5, self.num_lists)
        lengths = np.floor(share / share.sum() * self.num_rows).astype(np.int64)
        tiles = -(-lengths // TILE_ROWS)
        offsets = np.concatenate([[0], np.cumsum(tiles)]).astype(np.int32)
        total = int(offsets[-1]) * TILE_ROWS
        lists = np.repeat(np.arange(self.num_lists), tiles * TILE_ROWS)
        live = np.arange(total) - offsets[lists] * TILE_ROWS < lengths[lists]
        passes = rng.random((self.num_queries, total)) < self.selectivity
        centroids = rng.normal(size=(self.num_lists, self.width))
        return {
            "queries": rng.normal(size=(self.num_queries, self.width)).astype(np.float32),
            "centroids": centroids.astype(np.float32),
            "codes": rng.integers(-127, 128, (total, self.width), dtype=np.int8) * live[:, None],
            "scales": (rng.uniform(0.5, 1.5, total) / 127 * live).astype(np.float32),
            "tile_offsets": offsets,
            "live": _pack(live),
            "mask": _pack(passes),
        }


def _pack(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


WORKLOADS = {
    "tiny": IvfWorkload(2_000, 16, 12, 4, 10, 5, 0.5),
    "1m_64": IvfWorkload(1_000_000, 64, 1_024, 32, 100, 64, 0.1),
    "10m_128": IvfWorkload(10_000_000, 128, 4_096, 32, 1_000, 64, 0.1),
    "10m_128_k10k": IvfWorkload(10_000_000, 128, 4_096, 128, 10_000, 16),
}
