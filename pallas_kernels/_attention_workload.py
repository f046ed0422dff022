"""Named sizes that the attention ops share: sequences packed into token slots."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._backend import Backend


@dataclass(frozen=True)
class AttentionWorkload:
    """Sequences of 1 … max_len tokens, uniformly, packed into num_tokens slots without a gap."""

    op: Callable[..., jax.Array]
    num_tokens: int
    num_sequences: int
    max_len: int
    heads: int
    width: int
    dtype: str = "bfloat16"

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """q, k, v, seq_offsets."""
        tokens = jax.ShapeDtypeStruct(
            (self.num_tokens, self.heads, self.width), jnp.dtype(self.dtype)
        )
        offsets = jax.ShapeDtypeStruct((self.num_sequences + 1,), jnp.int32)
        return tokens, tokens, tokens, offsets

    def lengths(self, seed: int) -> np.ndarray:
        """Sequence lengths, cut where the slots are full; the sequences behind are empty."""
        drawn = np.random.default_rng(seed).integers(1, self.max_len + 1, self.num_sequences)
        ends = np.minimum(np.cumsum(drawn), self.num_tokens)
        return np.diff(ends, prepend=0)

    def arrays(self, seed: int) -> tuple[np.ndarray, ...]:
        """Normal q, k and v, and the offsets of `lengths`."""
        rng = np.random.default_rng(seed)
        shape = (self.num_tokens, self.heads, self.width)
        qkv = [rng.standard_normal(shape, np.float32).astype(self.dtype) for _ in range(3)]
        offsets = np.concatenate([[0], np.cumsum(self.lengths(seed))]).astype(np.int32)
        return *qkv, offsets

    def run(self, *arrays: Any, backend: Backend | None = None, config: Any = None) -> jax.Array:
        """The op of (q, k, v, seq_offsets) with the static arguments."""
        return self.op(
            *map(jnp.asarray, arrays), max_len=self.max_len, backend=backend, config=config
        )

    def gradient(
        self, *arrays: Any, backend: Backend | None = None, config: Any = None
    ) -> tuple[jax.Array, ...]:
        """(out, gradients of q, k and v); v stands in for the gradient of out."""
        q, k, v, offsets = map(jnp.asarray, arrays)
        out, pull = jax.vjp(
            lambda q, k, v: self.run(q, k, v, offsets, backend=backend, config=config), q, k, v
        )
        return out, *pull(v.astype(out.dtype))

    def floor_bytes(self) -> int:
        """q, k and v read once, the output written once."""
        itemsize = jnp.dtype(self.dtype).itemsize
        return 4 * self.num_tokens * self.heads * self.width * itemsize

    def floor_flops(self, seed: int = 0) -> int:
        """Two matmuls over the pairs of each sequence's lower triangle, and nothing else."""
        lengths = self.lengths(seed).astype(np.int64)
        return int(4 * self.heads * self.width * (lengths * (lengths + 1) // 2).sum())


def attention_workloads(op: Callable[..., jax.Array]) -> dict[str, AttentionWorkload]:
    """Short, middle and long sequences for `op`, by their longest; and one for tests."""
    return {
        "50": AttentionWorkload(op, 65_536, 3_072, max_len=50, heads=2, width=64),
        "200": AttentionWorkload(op, 65_536, 768, max_len=200, heads=4, width=64),
        "1k": AttentionWorkload(op, 131_072, 320, max_len=1_024, heads=8, width=64),
        "4k": AttentionWorkload(op, 131_072, 96, max_len=4_096, heads=8, width=128),
        "tiny": AttentionWorkload(op, 96, 7, max_len=30, heads=2, width=8, dtype="float32"),
    }
