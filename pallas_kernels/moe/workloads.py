"""Named sizes of MoE layers: those that papers report, and a tiny one."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._backend import Backend
from pallas_kernels.moe.api import Save, moe_ffn
from pallas_kernels.moe.config import MoeConfig


@dataclass(frozen=True)
class MoeWorkload:
    """One layer with SwiGLU experts in bf16; each token takes `slots` random experts.

    Attributes:
      num_tokens: T.
      width: D.
      hidden: H of an expert.
      num_experts: E.
      slots: K.
      skew: exponent of a power law over the experts' popularity; 0 balances them.
      save: what is kept for the gradient.
      chunk_tokens: tokens whose rows are gathered at once.
    """

    num_tokens: int
    width: int
    hidden: int
    num_experts: int
    slots: int
    skew: float = 0.0
    save: Save = "gate_up"
    chunk_tokens: int | None = None

    @property
    def num_pairs(self) -> int:
        """N = T·K."""
        return self.num_tokens * self.slots

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """x, expert_ids, gates, w_gate, w_up, w_down."""
        inner = (self.num_experts, self.width, self.hidden)
        shapes = [
            ((self.num_tokens, self.width), jnp.bfloat16),
            ((self.num_tokens, self.slots), jnp.int32),
            ((self.num_tokens, self.slots), jnp.float32),
            (inner, jnp.bfloat16),
            (inner, jnp.bfloat16),
            ((self.num_experts, self.hidden, self.width), jnp.bfloat16),
        ]
        return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)

    def arrays(self, seed: int) -> tuple[np.ndarray, ...]:
        """Normal inputs and weights, gates that sum to 1, distinct experts."""
        rng = np.random.default_rng(seed)
        popularity = -self.skew * np.log1p(np.arange(self.num_experts))
        # The largest of scores with Gumbel noise are a draw without replacement.
        scores = popularity + rng.gumbel(size=(self.num_tokens, self.num_experts))
        ids = np.argsort(-scores, axis=1)[:, : self.slots].astype(np.int32)
        gates = rng.random((self.num_tokens, self.slots), np.float32) + 0.1
        x, _, _, *weights = self.shapes()

        def normal(shape, scale):
            return np.asarray(rng.standard_normal(shape.shape, np.float32) * scale, shape.dtype)

        return (
            normal(x, 1.0),
            ids,
            gates / gates.sum(1, keepdims=True),
            *(normal(weight, weight.shape[1] ** -0.5) for weight in weights),
        )

    def run(
        self,
        *arrays: Any,
        backend: Backend | None = None,
        config: MoeConfig | None = None,
    ) -> jax.Array:
        """`moe_ffn` of (x, expert_ids, gates, w_gate, w_up, w_down)."""
        return moe_ffn(
            *arrays,
            save=self.save,
            chunk_tokens=self.chunk_tokens,
            backend=backend,
            config=config,
        )

    def gradient(
        self,
        *arrays: Any,
        backend: Backend | None = None,
        config: MoeConfig | None = None,
    ) -> tuple[jax.Array, ...]:
        """(y, gradients of x, gates and weights); x stands in for the gradient of y."""
        x, ids, gates, *weights = arrays

        def op(x, gates, *weights):
            return self.run(x, ids, gates, *weights, backend=backend, config=config)

        y, pull = jax.vjp(op, x, gates, *weights)
        return y, *pull(x)

    def rows_bound(self) -> int:
        """P: rows that tiles of 128 need at most, over all chunks at once."""
        return 128 * (-(-self.num_pairs // 128) + self.num_experts)

    def floor_flops(self) -> int:
        """6KDH a token, of the forward pass; a gradient takes twice as many."""
        return 6 * self.num_pairs * self.width * self.hidden

    def floor_bytes(self) -> int:
        """Forward: x, y and the weights once; gate and up, if kept, written once."""
        weights = 3 * self.num_experts * self.width * self.hidden
        kept = {"gate_up": 4, "gate_up_fp8": 2, "x": 0}[self.save] * self.num_pairs * self.hidden
        return 2 * (2 * self.num_tokens * self.width + weights) + kept


def _paper(width: int, experts: int, slots: int, tokens: int) -> MoeWorkload:
    """MoEBlaze, table 1: the experts are four times as wide as the model."""
    return MoeWorkload(tokens, width, 4 * width, experts, slots)


WORKLOADS = {
    "conf1": _paper(512, 4, 1, 32 * 2048),
    "conf2": _paper(1024, 8, 2, 32 * 2048),
    "conf3": _paper(1024, 16, 4, 32 * 2048),
    "conf4": _paper(2048, 16, 4, 32 * 1024),
    "conf5": _paper(512, 16, 4, 32 * 1024),
    "conf6": _paper(1024, 16, 4, 16 * 1024),
    "conf7": _paper(2048, 8, 4, 16 * 512),
    "sonic_7b": MoeWorkload(24_576, 1536, 256, 128, 8),  # SonicMoE's 7B model
    "sonic_7b_skewed": MoeWorkload(24_576, 1536, 256, 128, 8, skew=1.0),
    "gh200": MoeWorkload(8192, 2048, 3072, 8, 2),  # a published measurement on GH200
    "tiny": MoeWorkload(80, 128, 128, 4, 2),
}
