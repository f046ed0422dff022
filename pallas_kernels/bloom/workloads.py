"""Named sizes of Bloom searches."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._backend import Backend
from pallas_kernels.bloom.api import BloomMasks, bloom_search
from pallas_kernels.bloom.build import bloom_build, partition_width
from pallas_kernels.bloom.config import BloomConfig
from pallas_kernels.bloom.hash import row_hashes
from pallas_kernels.bloom.program import BloomOp

_TAIL_VALUES = 50_000


@dataclass(frozen=True)
class BloomWorkload:
    """Items with one head value and `terms_per_item` tail terms; every query runs `PROGRAM`.

    The program is (h OR t1) AND t2 AND NOT t3: four leaves, one exact and three Bloom terms.
    `random_bits` fills the index with random bits instead of building it from items, which takes
    minutes for tens of millions and makes no difference to a search's speed.
    """

    num_items: int
    num_queries: int
    bundle_words: int = 1024
    num_head: int = 64
    terms_per_item: int = 10
    num_hashes: int = 4
    max_fpr: float = 1e-3
    random_bits: bool = False

    PROGRAM = (
        BloomOp.HEAD,
        BloomOp.TAIL,
        BloomOp.OR,
        BloomOp.TAIL,
        BloomOp.AND,
        BloomOp.TAIL,
        BloomOp.NOT,
        BloomOp.AND,
    )

    @property
    def num_bundles(self) -> int:
        """Bundles of 32·bundle_words items, the last one partly empty."""
        return -(-self.num_items // (32 * self.bundle_words))

    @property
    def width(self) -> int:
        """Rows of a partition."""
        return partition_width(self.terms_per_item, self.num_hashes, self.max_fpr)

    @property
    def num_rows(self) -> int:
        """Rows of all bundles."""
        return self.num_bundles * (self.num_head + self.num_hashes * self.width)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """rows, row_offsets, opcodes, operands."""
        programs = (self.num_queries, len(self.PROGRAM))
        return (
            jax.ShapeDtypeStruct((self.num_rows, self.bundle_words), jnp.uint32),
            jax.ShapeDtypeStruct((self.num_bundles + 1,), jnp.int32),
            jax.ShapeDtypeStruct(programs, jnp.int32),
            jax.ShapeDtypeStruct((*programs, self.num_hashes), jnp.uint32),
        )

    def arrays(self, seed: int) -> tuple[jax.Array | np.ndarray, ...]:
        """A random catalogue's index and random programs over it."""
        rng = np.random.default_rng(seed)
        terms = rng.integers(0, 2**32, (_TAIL_VALUES, 2), dtype=np.uint32)
        rows, row_offsets = self._random(rng) if self.random_bits else self._build(rng, terms)
        opcodes = np.tile(np.array(self.PROGRAM, np.int32), (self.num_queries, 1))
        operands = row_hashes(terms[rng.integers(0, _TAIL_VALUES, opcodes.shape)], self.num_hashes)
        operands[:, 0, 0] %= self.num_head
        return rows, row_offsets, opcodes, operands

    def _build(self, rng: np.random.Generator, terms: np.ndarray) -> tuple[Any, Any]:
        items = np.arange(self.num_items, dtype=np.int32)
        tail_items = np.repeat(items, self.terms_per_item)
        return bloom_build(
            self.num_items,
            bundle_words=self.bundle_words,
            num_head=self.num_head,
            num_hashes=self.num_hashes,
            widths=np.full(self.num_bundles, self.width, np.int32),
            head_items=items,
            head_rows=rng.integers(0, self.num_head, self.num_items).astype(np.int32),
            tail_items=tail_items,
            tail_terms=terms[rng.integers(0, _TAIL_VALUES, tail_items.size)],
        )

    def _random(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Three quarters of the bits set, with which about a seventh of the items pass."""
        (rows, words), offsets = self.shapes()[0].shape, np.arange(self.num_bundles + 1)
        bits = np.frombuffer(rng.bytes(4 * rows * words), np.uint32).reshape(rows, words)
        bits = bits | np.roll(bits, 1, axis=1)
        return bits, (offsets * (rows // self.num_bundles)).astype(np.int32)

    def run(
        self,
        *arrays: Any,
        tile_words: int = 2,
        backend: Backend | None = None,
        config: BloomConfig | None = None,
    ) -> BloomMasks:
        """`bloom_search` of (rows, row_offsets, opcodes, operands, …) with its static ones."""
        return bloom_search(
            *arrays,
            num_head=self.num_head,
            num_items=self.num_items,
            tile_words=tile_words,
            backend=backend,
            config=config,
        )

    def row_bytes(self) -> int:
        """Bytes of the rows that the programs name, each counted every time it is named."""
        leaves = self.PROGRAM.count(BloomOp.HEAD)
        leaves += self.num_hashes * self.PROGRAM.count(BloomOp.TAIL)
        return self.num_queries * leaves * self.num_bundles * self.bundle_words * 4

    def floor_bytes(self) -> int:
        """Every named row read at most once from memory, and both masks written."""
        mask_bytes = 2 * self.num_queries * self.num_bundles * self.bundle_words * 4
        return min(self.row_bytes(), self.num_rows * self.bundle_words * 4) + mask_bytes


WORKLOADS = {
    "1m_q1": BloomWorkload(num_items=1_000_000, num_queries=1),
    "1m_q64": BloomWorkload(num_items=1_000_000, num_queries=64),
    "10m_q1": BloomWorkload(num_items=10_000_000, num_queries=1),
    "10m_q64": BloomWorkload(num_items=10_000_000, num_queries=64),
    # SilverTorch's Bloom test: six features of about ten values, five hashes; 1,090 bits an item.
    "40m_silvertorch": BloomWorkload(
        40_000_000, 16, terms_per_item=60, num_hashes=5, random_bits=True
    ),
    "tiny": BloomWorkload(
        num_items=9_000, num_queries=3, bundle_words=128, num_head=4, terms_per_item=3
    ),
}
