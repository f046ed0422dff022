"""Named sizes of IVF searches."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._backend import Backend
from pallas_kernels.ivf.api import IvfTopK, ivf_search
from pallas_kernels.ivf.config import TILE_ROWS, IvfConfig, IvfKernelConfig
from pallas_kernels.ivf.ref import probed_tiles_bound

_SPREAD = 40  # of a row's codes around those of its list
_CHUNK_ROWS = 1 << 18


@dataclass(frozen=True)
class IvfWorkload:
    """Rows around the centroids of `num_lists` lists whose lengths vary by up to half their mean.

    Each query lies near a list's centroid; its mask lets `selectivity` of the rows pass.
    """

    num_rows: int
    width: int
    num_lists: int
    nprobe: int
    k: int
    num_queries: int
    selectivity: float = 1.0

    def lengths(self, seed: int = 0) -> np.ndarray:
        """Rows of each list."""
        share = np.random.default_rng(seed).uniform(0.5, 1.5, self.num_lists)
        return np.floor(share / share.sum() * self.num_rows).astype(np.int64)

    def tile_offsets(self, seed: int = 0) -> np.ndarray:
        """First tile of each list, and the end of the last; i32[num_lists + 1]."""
        tiles = -(-self.lengths(seed) // TILE_ROWS)
        tiles[-1] += tiles.sum() % 2  # masks of a multiple of 16 bytes are read in place
        return np.concatenate([[0], np.cumsum(tiles)]).astype(np.int32)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arrays of seed 0."""
        rows = int(self.tile_offsets()[-1]) * TILE_ROWS
        return (
            jax.ShapeDtypeStruct((self.num_queries, self.width), jnp.float32),
            jax.ShapeDtypeStruct((self.num_lists, self.width), jnp.float32),
            jax.ShapeDtypeStruct((rows, self.width), jnp.int8),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct((self.num_lists + 1,), jnp.int32),
            jax.ShapeDtypeStruct((rows // 32,), jnp.uint32),
            jax.ShapeDtypeStruct((self.num_queries, rows // 32), jnp.uint32),
        )

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """The array arguments of `ivf_search`."""
        rng = np.random.default_rng(seed + 1)
        lengths, offsets = self.lengths(seed), self.tile_offsets(seed)
        total = int(offsets[-1]) * TILE_ROWS
        lists = np.repeat(np.arange(self.num_lists, dtype=np.int32), np.diff(offsets) * TILE_ROWS)
        live = np.arange(total) - offsets[lists].astype(np.int64) * TILE_ROWS < lengths[lists]
        centres = rng.integers(-127 + _SPREAD, 128 - _SPREAD, (self.num_lists, self.width), np.int8)
        codes = np.zeros((total, self.width), np.int8)
        for start in range(0, total, _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            noise = rng.integers(-_SPREAD, _SPREAD + 1, codes[part].shape, np.int8)
            codes[part] = (centres[lists[part]] + noise) * live[part, None]
        near = centres[rng.integers(0, self.num_lists, self.num_queries)]
        return {
            "queries": (near / 127 + rng.normal(size=near.shape) / 4).astype(np.float32),
            "centroids": (centres / 127).astype(np.float32),
            "codes": codes,
            "scales": (rng.uniform(0.9, 1.1, total) / 127 * live).astype(np.float32),
            "tile_offsets": offsets,
            "live": _pack(live),
            "mask": self._masks(rng, total),
        }

    def _masks(self, rng: np.random.Generator, total: int) -> np.ndarray:
        masks = np.full((self.num_queries, total // 32), 2**32 - 1, np.uint32)
        if self.selectivity < 1:
            for mask in masks:
                mask[:] = _pack(rng.random(total, np.float32) < self.selectivity)
        return masks

    def run(
        self,
        *arrays: Any,
        backend: Backend | None = None,
        config: IvfConfig | IvfKernelConfig | None = None,
    ) -> IvfTopK:
        """`ivf_search` of the arrays of seed 0."""
        offsets = self.tile_offsets()
        return ivf_search(
            *arrays,
            k=self.k,
            nprobe=self.nprobe,
            max_tiles=probed_tiles_bound(offsets, self.nprobe),
            max_list_tiles=probed_tiles_bound(offsets, 1),
            backend=backend,
            config=config,
        )

    def distinct_lists(self) -> float:
        """Lists that the batch probes, on average, if its queries choose at random."""
        missed = (1 - self.nprobe / self.num_lists) ** self.num_queries
        return self.num_lists * (1 - missed)

    def floor_bytes(self) -> int:
        """Codes and scales of the lists that the batch probes, read once, and the centroids."""
        rows = self.distinct_lists() * self.num_rows / self.num_lists
        centroids = 0 if self.nprobe == self.num_lists else self.num_lists * self.width * 4
        return round(rows * (self.width + 4)) + centroids


def _pack(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


WORKLOADS = {
    "tiny": IvfWorkload(2_000, 32, 12, 4, 10, 5, 0.5),
    "1m_64": IvfWorkload(1_000_000, 64, 1_024, 32, 100, 64, 0.1),
    "10m_128_q1": IvfWorkload(10_000_000, 128, 4_096, 32, 1_000, 1),
    "10m_128": IvfWorkload(10_000_000, 128, 4_096, 32, 1_000, 64, 0.1),
    "10m_128_q512": IvfWorkload(10_000_000, 128, 4_096, 32, 1_000, 512),
    "10m_128_k10k": IvfWorkload(10_000_000, 128, 4_096, 128, 10_000, 16),
    "20m_128": IvfWorkload(20_000_000, 128, 8_192, 32, 2_048, 16),  # SilverTorch, its ANN test
}
