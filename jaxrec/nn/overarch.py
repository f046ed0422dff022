"""OverArchs: networks that re-rank retrieved candidates by more than a dot product.

An item's share of the work depends on its embedding alone: `item_components` computes it for the
whole catalogue once, at publishing, and the serving call gathers the candidates' rows.
"""

import abc
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32

from jaxrec.nn.checks import check_at_least, check_heads
from jaxrec.nn.layers import LayerNorm, Linear
from jaxrec.ops.overarch import candidate_attention, dot_scores
from jaxrec.typing import PyTree

CANDIDATE_CHUNK = 2048
"""Candidates of a query that a pointwise over-arch scores at once."""


class OverArch(Protocol):
    """What re-ranks candidates."""

    def item_components(self, item_embeddings: Float[Array, "V D"]) -> PyTree:
        """Arrays with one row an item (leading axis V): columns to cache beside the index."""
        ...

    def __call__(
        self, query: Float[Array, "M *tasks D"], components: PyTree, valid: Bool[Array, "M K0"]
    ) -> Float32[Array, "M K0 *tasks"]:
        """Scores of each query's candidates, given their rows of `item_components`."""
        ...


class ResidualOverArch(nnx.Module):
    """score = ⟨query, item⟩ + scale · f(query, item); scale is learned, from `config.scale` on.

    With scale 0 it begins as the dot product that retrieved the candidates, and learns what that
    misses. Subclasses give `f` by `_components` and `_score`, and take a frozen `config` with
    `width`, `residual` (False drops the dot product) and `scale`.

    Attributes:
      listwise: whether a candidate's score depends on the other candidates. Pointwise scores are
        made in chunks of `CANDIDATE_CHUNK` candidates.
    """

    listwise: ClassVar[bool] = False
    config: Any

    def __init__(self, config: Any):
        self.config = config
        self.scale = nnx.Param(jnp.asarray(config.scale, jnp.float32))

    @abc.abstractmethod
    def _components(self, item_embeddings: jax.Array) -> dict[str, jax.Array]:
        """What `_score` needs of each item."""

    @abc.abstractmethod
    def _score(
        self, query: jax.Array, components: dict[str, jax.Array], valid: jax.Array
    ) -> jax.Array:
        """f for each query and candidate, [M, K0]."""

    def item_components(self, item_embeddings: Float[Array, "V D"]) -> dict[str, jax.Array]:
        """Everything that scores need of an item; each array leads with V."""
        if item_embeddings.shape[-1] != self.config.width:
            raise ValueError(
                f"{type(self).__name__} was built for width {self.config.width}; the item "
                f"embeddings have {item_embeddings.shape[-1]}"
            )
        components = self._components(item_embeddings)
        return {**components, "item": item_embeddings} if self.config.residual else components

    def __call__(
        self,
        query: Float[Array, "M *tasks D"],
        components: dict[str, jax.Array],
        valid: Bool[Array, "M K0"],
    ) -> Float32[Array, "M K0 *tasks"]:
        """Scores of the candidates, -inf for those that are not valid.

        Args:
          query: one vector for each of M queries, or one a task: [M, T, D] gives [M, K0, T].
          components: rows of `item_components`, leading with [M, K0], or with [1, K0] where all
            queries share the candidates.
          valid: False for padding; such candidates influence nothing.
        """
        if query.ndim == 3:
            per_task = jax.vmap(lambda q: self(q, components, valid), in_axes=1, out_axes=-1)
            return per_task(query)
        num_candidates = valid.shape[1]
        if self.listwise or num_candidates <= CANDIDATE_CHUNK:
            scores = self._full_score(query, components, valid)
        else:
            scores = self._chunked(query, components, valid)
        return jnp.where(valid, scores, -jnp.inf)

    def _full_score(self, query, components, valid) -> jax.Array:
        scores = self.scale[...] * self._score(query, components, valid).astype(jnp.float32)
        return scores + dot_scores(query, components["item"]) if self.config.residual else scores

    def _chunked(self, query, components, valid) -> jax.Array:
        num_candidates = valid.shape[1]
        num_chunks = -(-num_candidates // CANDIDATE_CHUNK)
        size = -(-num_candidates // num_chunks)

        def split(x):
            padding = [(0, 0), (0, num_chunks * size - num_candidates)] + [(0, 0)] * (x.ndim - 2)
            x = jnp.pad(x, padding)
            return x.reshape(x.shape[0], num_chunks, size, *x.shape[2:]).swapaxes(0, 1)

        chunks = jax.tree.map(split, (components, valid))
        scores = jax.lax.map(lambda chunk: self._full_score(query, *chunk), chunks)
        return scores.swapaxes(0, 1).reshape(query.shape[0], -1)[:, :num_candidates]


@dataclass(frozen=True)
class MLPOverArchConfig:
    """Shape of an `MLPOverArch`.

    Attributes:
      width: of queries and item embeddings.
      hidden: widths of the hidden layers, one at least.
      residual, scale: see `ResidualOverArch`.
    """

    width: int
    hidden: tuple[int, ...] = (128, 64)
    residual: bool = True
    scale: float = 0.0

    def __post_init__(self):
        check_at_least(self, width=1)
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"MLPOverArchConfig.hidden is {self.hidden}; expected sizes above 0")


class MLPOverArch(ResidualOverArch):
    """A network over query, item and their elementwise product; pointwise.

    Cost: 2·(D·H₁ + H₁·H₂ + …) FLOPs a candidate; the item's part of the first layer is cached.
    """

    def __init__(self, config: MLPOverArchConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        first, width = config.hidden[0], config.width
        spread = width**-0.5
        self.from_query = Linear(width, first, rngs=rngs, std=spread)
        self.from_item = Linear(width, first, rngs=rngs, std=spread, bias=False)
        self.from_product = Linear(width, first, rngs=rngs, std=spread, bias=False)
        sizes = [*config.hidden, 1]
        self.layers = nnx.List(
            [
                # A bias of the score itself would change no ranking, and never be trained.
                Linear(fan_in, fan_out, rngs=rngs, std=fan_in**-0.5, bias=fan_out > 1)
                for fan_in, fan_out in itertools.pairwise(sizes)
            ]
        )

    def _components(self, item_embeddings):
        return {"row": item_embeddings, "hidden": self.from_item(item_embeddings)}

    def _score(self, query, components, valid):
        product = query[:, None] * components["row"]
        x = self.from_query(query)[:, None] + components["hidden"] + self.from_product(product)
        for layer in self.layers:
            x = layer(jax.nn.silu(x))
        return x[..., 0]


@dataclass(frozen=True)
class AttentionOverArchConfig:
    """Shape of an `AttentionOverArch`.

    Attributes:
      width: of queries and item embeddings.
      hidden: width of the candidates' states.
      num_heads: the heads share `hidden` equally.
      num_blocks: attention and feed-forward network, so many times.
      ffn_factor: width of the feed-forward network by `hidden`.
      residual, scale: see `ResidualOverArch`.
    """

    width: int
    hidden: int = 64
    num_heads: int = 2
    num_blocks: int = 1
    ffn_factor: int = 2
    residual: bool = True
    scale: float = 0.0

    def __post_init__(self):
        check_at_least(self, width=1, hidden=1, num_heads=1, num_blocks=1, ffn_factor=1)
        check_heads(self, self.hidden, self.num_heads)


class CandidateBlock(nnx.Module):
    """Attention among the candidates, then a feed-forward network; pre-norm, residual."""

    def __init__(self, config: AttentionOverArchConfig, *, rngs: nnx.Rngs):
        hidden, self.num_heads = config.hidden, config.num_heads
        self.attention_norm, self.ffn_norm = LayerNorm(hidden), LayerNorm(hidden)
        self.qkv = Linear(hidden, 3 * hidden, rngs=rngs, std=hidden**-0.5)
        self.out = Linear(hidden, hidden, rngs=rngs)
        self.up = Linear(hidden, config.ffn_factor * hidden, rngs=rngs, std=hidden**-0.5)
        self.down = Linear(config.ffn_factor * hidden, hidden, rngs=rngs)

    def __call__(
        self, x: Float[Array, "M K0 H"], valid: Bool[Array, "M K0"]
    ) -> Float[Array, "M K0 H"]:
        """The candidates' next states; invalid ones are seen by none."""
        qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = (qkv[:, :, part] for part in range(3))
        x = x + self.out(candidate_attention(q, k, v, valid).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.ffn_norm(x))))


class AttentionOverArch(ResidualOverArch):
    """Self-attention over the candidates: each is scored in view of the others; listwise.

    Scores do not depend on the order of the candidates (permutation equivariant).
    Cost: 4·K0²·H + O(K0·H²) FLOPs a block and query; memory is bounded, see
    `candidate_attention`.
    """

    listwise = True

    def __init__(self, config: AttentionOverArchConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        width, hidden = config.width, config.hidden
        self.from_query = Linear(width, hidden, rngs=rngs, std=width**-0.5)
        self.from_item = Linear(width, hidden, rngs=rngs, std=width**-0.5, bias=False)
        self.from_product = Linear(width, hidden, rngs=rngs, std=width**-0.5, bias=False)
        blocks = [CandidateBlock(config, rngs=rngs) for _ in range(config.num_blocks)]
        self.blocks = nnx.List(blocks)
        self.norm = LayerNorm(hidden)
        self.out = Linear(hidden, 1, rngs=rngs, std=hidden**-0.5, bias=False)

    def _components(self, item_embeddings):
        return {"row": item_embeddings, "hidden": self.from_item(item_embeddings)}

    def _score(self, query, components, valid):
        product = query[:, None] * components["row"]
        x = self.from_query(query)[:, None] + components["hidden"] + self.from_product(product)
        for block in self.blocks:
            x = block(x, valid)
        return self.out(self.norm(x))[..., 0]
