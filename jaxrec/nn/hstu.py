"""HSTU: pointwise attention with gating, relative position and time biases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from jaxrec.nn.checks import check_at_least, check_choice, check_heads, check_share
from jaxrec.nn.layers import ItemEmbedding, LayerNorm, Linear
from jaxrec.nn.moe import MoEConfig, MoELayer, MoEReport, check_experts, config_from_dict
from jaxrec.ops.jagged import JaggedBatch, positions
from jaxrec.ops.layers import dropout, layer_norm, split_or_none
from pallas_kernels import hstu_attention


@dataclass(frozen=True)
class HSTUConfig:
    """Shape of an HSTU.

    Attributes:
      num_items: items in the catalogue, numbered from 1.
      max_len: tokens of the longest sequence.
      num_attributes, attribute_slots: see `ItemEmbedding`; 0 embeds items by their number alone.
      qk_width, v_width: width of one head's queries and keys, and of its values; None means
        width / num_heads.
      time_buckets: 0 leaves the time bias out (for data without timestamps).
      absolute_positions: learned embeddings of the position, added to the items'.
      moe: experts behind every block's attention, of the model's width; None, as in the paper, for
        no feed-forward network.

    Raises:
      ValueError: a size below 1, dropout outside 0 … 1, a width that the heads do not divide
        although qk_width or v_width follow from it, an unknown compute_dtype, experts of another
        width.
    """

    num_items: int
    max_len: int = 50
    width: int = 64
    num_blocks: int = 2
    num_heads: int = 1
    qk_width: int | None = None
    v_width: int | None = None
    dropout: float = 0.5
    time_buckets: int = 0
    absolute_positions: bool = True
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    num_attributes: int = 0
    attribute_slots: int = 0
    moe: MoEConfig | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "HSTUConfig":
        """The configuration of stored fields, as `dataclasses.asdict` gives them."""
        return config_from_dict(cls, fields)

    def __post_init__(self):
        check_experts(self)
        check_at_least(
            self, num_items=1, max_len=1, width=1, num_blocks=1, num_heads=1, time_buckets=0
        )
        for name in ("qk_width", "v_width"):
            if getattr(self, name) is None:
                check_heads(self, self.width, self.num_heads)
            else:
                check_at_least(self, **{name: 1})
        check_share(self, "dropout", below_one=True)
        check_choice(self, "compute_dtype", ("float32", "bfloat16"))


def _learned(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


class HSTUBlock(nnx.Module):
    """y = x + f₂(norm(attention(q, k, v)) ⊙ u), where u, v, q, k = silu(f₁(norm(x))).

    With experts, y + experts(norm(y)).
    """

    def __init__(self, config: HSTUConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads = config.num_heads
        self.qk_width = config.qk_width or config.width // heads
        self.v_width = config.v_width or config.width // heads
        self.norm = LayerNorm(config.width)
        self.uvqk = Linear(config.width, 2 * heads * (self.qk_width + self.v_width), rngs=rngs)
        self.out = Linear(heads * self.v_width, config.width, rngs=rngs)
        self.position_bias = _learned((heads, config.max_len), rngs)
        buckets = config.time_buckets
        self.time_bias = _learned((heads, buckets), rngs) if buckets else None
        self.moe = None if config.moe is None else MoELayer(config.moe, rngs=rngs)
        self.moe_norm = None if config.moe is None else LayerNorm(config.width)

    def __call__(
        self, x: Float[jax.Array, "T D"], batch: JaggedBatch, key: jax.Array | None
    ) -> tuple[Float[jax.Array, "T D"], MoEReport | None]:
        """The block's output for every token slot, and its experts' report, if it has experts.

        Dropout and the router's noise only where a key is given.
        """
        heads, tokens = self.config.num_heads, x.shape[0]
        widths = [heads * self.v_width] * 2 + [heads * self.qk_width]
        ends = [sum(widths[: i + 1]) for i in range(3)]
        u, v, q, k = jnp.split(jax.nn.silu(self.uvqk(self.norm(x))), ends, axis=-1)
        attended = hstu_attention(
            q.reshape(tokens, heads, -1),
            k.reshape(tokens, heads, -1),
            v.reshape(tokens, heads, -1),
            jnp.asarray(batch.seq_offsets),
            max_len=self.config.max_len,
            position_bias=self.position_bias[...],
            timestamps=None if self.time_bias is None else jnp.asarray(batch.timestamps),
            time_bias=None if self.time_bias is None else self.time_bias[...],
        )
        gated = layer_norm(attended.reshape(tokens, -1)) * u
        return self._feed_forward(
            x + self.out(dropout(gated, self.config.dropout, key)), batch, key
        )

    def _feed_forward(
        self, x: jax.Array, batch: JaggedBatch, key: jax.Array | None
    ) -> tuple[jax.Array, MoEReport | None]:
        if self.moe is None or self.moe_norm is None:
            return x, None
        # Folded in, so that models without experts draw what they always drew.
        noise_key, dropout_key = split_or_none(
            None if key is None else jax.random.fold_in(key, 1), 2
        )
        offsets = jnp.asarray(batch.seq_offsets)
        out, report = self.moe.on_sequences(self.moe_norm(x), offsets, key=noise_key)
        return x + dropout(out, self.config.dropout, dropout_key), report


class HSTU(nnx.Module):
    """Item embeddings → HSTU blocks; scores are dot products with the same embeddings.

    Source: Zhai et al., Actions Speak Louder than Words (ICML 2024).
    """

    def __init__(
        self,
        config: HSTUConfig,
        *,
        rngs: nnx.Rngs,
        attribute_ids: Int[jax.Array | np.ndarray, "V slots"] | None = None,
    ):
        self.config = config
        self.items = ItemEmbedding(
            config.num_items,
            config.width,
            rngs=rngs,
            num_attributes=config.num_attributes,
            attribute_slots=config.attribute_slots,
            attribute_ids=attribute_ids,
        )
        shape = (config.max_len, config.width)
        self.positions = _learned(shape, rngs) if config.absolute_positions else None
        self.blocks = nnx.List([HSTUBlock(config, rngs=rngs) for _ in range(config.num_blocks)])
        self.norm = LayerNorm(config.width)

    def encode(
        self, batch: JaggedBatch, *, key: jax.Array | None = None
    ) -> Float[jax.Array, "T D"]:
        """Hidden state of every token slot; dropout only where a key is given.

        Slots behind the last sequence hold finite values without meaning. The dtype is the
        configuration's `compute_dtype`.
        """
        return self.encode_with_reports(batch, key=key)[0]

    def encode_with_reports(
        self, batch: JaggedBatch, *, key: jax.Array | None = None
    ) -> tuple[Float[jax.Array, "T D"], tuple[MoEReport, ...]]:
        """`encode`, and the report of every block's experts, if it has some."""
        keys = split_or_none(key, len(self.blocks) + 1)
        x = self.items(jnp.asarray(batch.item_ids)) * self.config.width**0.5
        if self.positions is not None:
            position = positions(batch.seq_offsets, batch.item_ids.shape[0])
            x = x + self.positions[...][jnp.clip(position, 0, self.config.max_len - 1)]
        x = dropout(x.astype(self.config.compute_dtype), self.config.dropout, keys[0])
        reports = []
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x, report = block(x, batch, block_key)
            reports.append(report)
        return self.norm(x), tuple(report for report in reports if report is not None)

    def moe_layers(self) -> list[MoELayer]:
        """The blocks' experts, in the order of their reports."""
        return [block.moe for block in self.blocks if block.moe is not None]

    def item_embeddings(self) -> Float[jax.Array, "V D"]:
        """Rows that hidden states are scored against; row 0 is padding."""
        return self.items.rows()
