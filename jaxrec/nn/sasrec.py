"""SASRec: a causal Transformer over a user's items, with an optional causal frequency filter."""

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
from jaxrec.ops.jagged import JaggedBatch, positions, positions_from_end
from jaxrec.ops.layers import causal_filter, dropout, split_or_none
from pallas_kernels import softmax_attention


@dataclass(frozen=True)
class SASRecConfig:
    """Shape of a SASRec.

    Attributes:
      num_items: items in the catalogue, numbered from 1.
      max_len: tokens of the longest sequence.
      num_attributes, attribute_slots: see `ItemEmbedding`; 0 embeds items by their number alone.
      positions: which end positions count from. "end" suits one sample per prefix, where the
        last token is the only one scored; "start" any sampling. With "end" an output depends on
        how many tokens follow it (never on which), so train and score on whole prefixes.
      filter_share: 0 is plain attention; otherwise the weight of the causal frequency filter
        beside attention, which keeps 1 - filter_share.
      filter_cutoff: frequencies that the filter's low-pass starts with, of max_len // 2 + 1.
      moe: experts in place of every block's feed-forward network, of the same width (`ffn_factor`
        then says nothing); None for the dense network.

    Raises:
      ValueError: a size below 1, a share outside 0 … 1 (dropout: below 1), a width that the heads
        do not divide, an unknown choice, experts of another width.
    """

    num_items: int
    max_len: int = 50
    width: int = 64
    num_blocks: int = 2
    num_heads: int = 1
    ffn_factor: int = 4
    dropout: float = 0.5
    positions: Literal["start", "end"] = "start"
    filter_share: float = 0.0
    filter_cutoff: int = 5
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    num_attributes: int = 0
    attribute_slots: int = 0
    moe: MoEConfig | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "SASRecConfig":
        """The configuration of stored fields, as `dataclasses.asdict` gives them."""
        return config_from_dict(cls, fields)

    def __post_init__(self):
        check_experts(self)
        check_at_least(
            self, num_items=1, max_len=1, width=1, num_blocks=1, num_heads=1, ffn_factor=1
        )
        check_heads(self, self.width, self.num_heads)
        check_share(self, "dropout", below_one=True)
        check_share(self, "filter_share", below_one=False)
        check_choice(self, "positions", ("start", "end"))
        check_choice(self, "compute_dtype", ("float32", "bfloat16"))
        if self.filter_share and not 1 <= self.filter_cutoff <= self.max_len // 2 + 1:
            raise ValueError(
                f"SASRecConfig.filter_cutoff is {self.filter_cutoff}; expected 1 to "
                f"{self.max_len // 2 + 1}, the frequencies of max_len={self.max_len}"
            )


def low_pass_taps(max_len: int, cutoff: int) -> np.ndarray:
    """Past half of the circular kernel that keeps the lowest `cutoff` frequencies of max_len."""
    frequency, lag = np.arange(cutoff)[:, None], np.arange(max_len)
    # Every frequency stands for itself and its mirror image, but for the two that are their own.
    weight = np.where((frequency == 0) | (2 * frequency == max_len), 1, 2)
    return (weight * np.cos(2 * np.pi * frequency * lag / max_len)).sum(0) / max_len


class SelfAttention(nnx.Module):
    """Multi-head causal softmax attention."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.max_len = config.num_heads, config.max_len
        self.qkv = Linear(config.width, 3 * config.width, rngs=rngs)
        self.out = Linear(config.width, config.width, rngs=rngs)

    def __call__(
        self, x: Float[jax.Array, "T D"], seq_offsets: jax.Array
    ) -> Float[jax.Array, "T D"]:
        """Every token's mix of itself and the earlier tokens of its sequence."""
        qkv = self.qkv(x).reshape(x.shape[0], 3, self.num_heads, -1)
        attended = softmax_attention(
            qkv[:, 0], qkv[:, 1], qkv[:, 2], seq_offsets, max_len=self.max_len
        )
        return self.out(attended.reshape(x.shape))


class FrequencyFilter(nnx.Module):
    """low(x) + gain² · (x - low(x)), where low looks only at past tokens."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        taps = low_pass_taps(config.max_len, config.filter_cutoff)
        self.taps = nnx.Param(jnp.tile(jnp.asarray(taps, jnp.float32)[:, None], config.width))
        self.gain = nnx.Param(jax.random.normal(rngs.params(), (config.width,)))

    def __call__(
        self, x: Float[jax.Array, "T D"], seq_offsets: jax.Array
    ) -> Float[jax.Array, "T D"]:
        """Low frequencies as they are, the others by gain²."""
        low = causal_filter(x, seq_offsets, self.taps[...])
        return low + (self.gain[...] ** 2).astype(x.dtype) * (x - low)


class Block(nnx.Module):
    """Token mixing (attention, filter or both), then a feed-forward network; post-norm."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention = SelfAttention(config, rngs=rngs)
        self.filter = FrequencyFilter(config, rngs=rngs) if config.filter_share > 0 else None
        self.attention_norm = LayerNorm(config.width)
        self.filter_norm = LayerNorm(config.width) if config.filter_share > 0 else None
        width, hidden, dense = config.width, config.ffn_factor * config.width, config.moe is None
        self.up = Linear(width, hidden, rngs=rngs) if dense else None
        self.down = Linear(hidden, width, rngs=rngs) if dense else None
        self.moe = None if config.moe is None else MoELayer(config.moe, rngs=rngs)
        self.ffn_norm = LayerNorm(config.width)

    def __call__(
        self, x: Float[jax.Array, "T D"], seq_offsets: jax.Array, key: jax.Array | None
    ) -> tuple[Float[jax.Array, "T D"], MoEReport | None]:
        """The block's output for every token slot, and its experts' report, if it has experts.

        Dropout and the router's noise only where a key is given.
        """
        rate, share = self.config.dropout, self.config.filter_share
        keys = split_or_none(key, 3)
        attended = dropout(self.attention(x, seq_offsets), rate, keys[0])
        mixed = self.attention_norm(x + attended)
        if self.filter is not None and self.filter_norm is not None:
            filtered = dropout(self.filter(x, seq_offsets), rate, keys[1])
            mixed = (1 - share) * mixed + share * self.filter_norm(x + filtered)
        hidden, report = self._feed_forward(mixed, seq_offsets, key)
        return self.ffn_norm(mixed + dropout(hidden, rate, keys[2])), report

    def _feed_forward(
        self, x: jax.Array, seq_offsets: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, MoEReport | None]:
        if self.up is not None and self.down is not None:
            return self.down(jax.nn.gelu(self.up(x))), None
        assert self.moe is not None
        noise_key = None if key is None else jax.random.fold_in(key, 3)
        return self.moe.on_sequences(x, seq_offsets, key=noise_key)


class SASRec(nnx.Module):
    """Item embeddings + positions → blocks; scores are dot products with the same embeddings.

    Source: Kang & McAuley 2018; the filter beside attention after Shin et al., BSARec (AAAI
    2024), made causal so that it may be trained on all positions.
    """

    def __init__(
        self,
        config: SASRecConfig,
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
        self.positions = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.max_len, config.width))
        )
        self.norm = LayerNorm(config.width)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_blocks)])

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
        dtype = jnp.dtype(self.config.compute_dtype)
        keys = split_or_none(key, len(self.blocks) + 1)
        item_ids, offsets = jnp.asarray(batch.item_ids), jnp.asarray(batch.seq_offsets)
        place = positions if self.config.positions == "start" else positions_from_end
        position = jnp.clip(place(offsets, item_ids.shape[0]), 0, self.config.max_len - 1)
        x = self.items(item_ids) + self.positions[...][position]
        x = dropout(self.norm(x.astype(dtype)), self.config.dropout, keys[0])
        reports = []
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x, report = block(x, offsets, block_key)
            reports.append(report)
        return x, tuple(report for report in reports if report is not None)

    def moe_layers(self) -> list[MoELayer]:
        """The blocks' experts, in the order of their reports."""
        return [block.moe for block in self.blocks if block.moe is not None]

    def item_embeddings(self) -> Float[jax.Array, "V D"]:
        """Rows that hidden states are scored against; row 0 is padding."""
        return self.items.rows()
