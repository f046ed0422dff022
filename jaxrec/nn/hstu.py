"""HSTU: pointwise attention with gating, relative position and time biases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from jaxrec.nn.checks import check_at_least, check_choice, check_heads, check_share
from jaxrec.nn.layers import ItemEmbedding, LayerNorm, Linear
from jaxrec.nn.moe import MoEConfig, MoELayer, MoEReport, check_experts, config_from_dict
from jaxrec.ops.hstu_block import (
    SAVES,
    HSTUShape,
    HSTUWeights,
    Save,
    finish,
    hstu_block,
    project,
    split_heads,
)
from jaxrec.ops.jagged import JaggedBatch, positions
from jaxrec.ops.layers import dropout, split_or_none
from jaxrec.typing import PADDING_ID
from pallas_kernels import hstu_attention_cached


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
      save: what each block keeps for its gradient; see `jaxrec.ops.hstu_block`.
      moe: experts behind every block's attention, of the model's width; None, as in the paper, for
        no feed-forward network.

    Raises:
      ValueError: a size below 1, dropout outside 0 … 1, a width that the heads do not divide
        although qk_width or v_width follow from it, an unknown compute_dtype or save, experts of
        another width.
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
    save: Save | None = "projections"

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
        if self.save is not None:
            check_choice(self, "save", SAVES)


class HSTUCache(NamedTuple):
    """What an HSTU keeps of B sequences of at most S tokens, so that new ones cost only themselves.

    Attributes:
      keys, values: of every block; [B, S, H, qk_width] and [B, S, H, v_width] in the compute dtype.
      timestamps: of every slot; i32[B, S].
      lengths: tokens so far; i32[B].
    """

    keys: tuple[Float[jax.Array, "B S H Dqk"], ...]
    values: tuple[Float[jax.Array, "B S H Dv"], ...]
    timestamps: Int[jax.Array, "B S"]
    lengths: Int[jax.Array, "B"]


class _Arrivals(NamedTuple):
    """New tokens of a cache's sequences, right-aligned in rows of N.

    Attributes:
      real: where there is a token; bool[B, N].
      slots: place of each in its sequence, S where there is none; i32[B, N].
      timestamps, lengths: the cache's, with them.
    """

    real: Bool[jax.Array, "B N"]
    slots: Int[jax.Array, "B N"]
    timestamps: Int[jax.Array, "B S"]
    lengths: Int[jax.Array, "B"]

    def insert(self, cache: jax.Array, new: jax.Array) -> jax.Array:
        """[B, S, …] with the [B, N, …] of the new tokens in their slots."""
        rows = jnp.arange(cache.shape[0])[:, None]
        return cache.at[rows, self.slots].set(new.astype(cache.dtype), mode="drop")


def _learned(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


class HSTUBlock(nnx.Module):
    """y = x + f₂(norm(attention(q, k, v)) ⊙ u), where u, v, q, k = silu(f₁(norm(x))).

    With experts, y + experts(norm(y)).
    """

    def __init__(self, config: HSTUConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads = config.num_heads
        qk_width = config.qk_width or config.width // heads
        v_width = config.v_width or config.width // heads
        self.shape = HSTUShape(heads, qk_width, v_width, config.max_len, config.dropout)
        self.norm = LayerNorm(config.width)
        self.uvqk = Linear(config.width, 2 * heads * (qk_width + v_width), rngs=rngs)
        self.out = Linear(heads * v_width, config.width, rngs=rngs)
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
        y = hstu_block(
            x,
            self._weights(),
            jnp.asarray(batch.seq_offsets),
            shape=self.shape,
            timestamps=None if self.time_bias is None else jnp.asarray(batch.timestamps),
            key=key,
            save=self.config.save,
        )
        return self._feed_forward(y, batch, key)

    def extend(
        self,
        x: Float[jax.Array, "B N D"],
        keys: Float[jax.Array, "B S H Dqk"],
        values: Float[jax.Array, "B S H Dv"],
        arrivals: _Arrivals,
    ) -> tuple[Float[jax.Array, "B N D"], jax.Array, jax.Array]:
        """The block's output for new tokens, and the cache with their keys and values."""
        weights = self._weights()
        z = project(x, weights)
        v, q, k = split_heads(z[..., self.shape.gate_columns :], self.shape)
        keys, values = arrivals.insert(keys, k), arrivals.insert(values, v)
        attended = hstu_attention_cached(
            q,
            keys,
            values,
            arrivals.lengths,
            max_len=self.config.max_len,
            position_bias=weights.position_bias,
            timestamps=None if self.time_bias is None else arrivals.timestamps,
            time_bias=weights.time_bias,
        )
        u = z[..., : self.shape.gate_columns]
        x = finish(x, u, attended.reshape(u.shape), weights)
        if self.moe is not None and self.moe_norm is not None:
            sequences, new = x.shape[:2]
            out, _ = self.moe(
                self.moe_norm(x).reshape(sequences * new, -1),
                valid=arrivals.real.reshape(-1),
                segment_ids=jnp.repeat(jnp.arange(sequences, dtype=jnp.int32), new),
                num_sequences=sequences,
            )
            x = x + out.reshape(x.shape)
        return x, keys, values

    def _weights(self) -> HSTUWeights:
        assert self.uvqk.bias is not None
        assert self.out.bias is not None
        return HSTUWeights(
            self.norm.scale[...],
            self.norm.bias[...],
            self.uvqk.kernel[...],
            self.uvqk.bias[...],
            self.out.kernel[...],
            self.out.bias[...],
            self.position_bias[...],
            None if self.time_bias is None else self.time_bias[...],
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
        position = positions(batch.seq_offsets, batch.item_ids.shape[0])
        x = self._embed(jnp.asarray(batch.item_ids), position)
        x = dropout(x, self.config.dropout, keys[0])
        reports = []
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x, report = block(x, batch, block_key)
            reports.append(report)
        return self.norm(x), tuple(report for report in reports if report is not None)

    def _embed(self, item_ids: jax.Array, position: jax.Array) -> jax.Array:
        x = self.items(item_ids) * self.config.width**0.5
        if self.positions is not None:
            x = x + self.positions[...][jnp.clip(position, 0, self.config.max_len - 1)]
        return x.astype(self.config.compute_dtype)

    def empty_cache(self, num_sequences: int, capacity: int | None = None) -> HSTUCache:
        """Room for `capacity` tokens of each sequence; None means max_len, rounded up to 8."""
        config = self.config
        capacity = -(-config.max_len // 8) * 8 if capacity is None else capacity

        def room(block: HSTUBlock, width: str) -> jax.Array:
            shape = (num_sequences, capacity, config.num_heads, getattr(block.shape, width))
            return jnp.zeros(shape, config.compute_dtype)

        return HSTUCache(
            tuple(room(block, "qk_width") for block in self.blocks),
            tuple(room(block, "v_width") for block in self.blocks),
            jnp.zeros((num_sequences, capacity), jnp.int32),
            jnp.zeros(num_sequences, jnp.int32),
        )

    def extend(
        self,
        cache: HSTUCache,
        item_ids: Int[jax.Array | np.ndarray, "B N"],
        timestamps: Int[jax.Array | np.ndarray, "B N"] | None = None,
    ) -> tuple[Float[jax.Array, "B N D"], HSTUCache]:
        """Hidden states of new tokens as `encode` gives them, at the cost of the new ones alone.

        Args:
          cache: of the tokens before; `empty_cache` to begin with, where the first call brings the
            whole history. Donate it to `jax.jit` to have it changed in place.
          item_ids: the new tokens of each sequence in order, with `PADDING_ID` to their left where
            there are fewer than N: the last column is each sequence's newest token.
          timestamps: of the new tokens; a model with time bias needs them.

        Returns:
          Hidden states, and the cache with the new tokens. The state of a padding token has no
          meaning. All states of a sequence are NaN, from then on, when it outgrows max_len or the
          cache's room or has padding right of a token; its length then is greater than that room.
          A sequence that is too long goes on in a new cache of its last tokens.

        Raises:
          ValueError: a model with time bias gets no timestamps.
        """
        if timestamps is None and self.config.time_buckets:
            raise ValueError("this HSTU has a time bias: give the new tokens' timestamps")
        items = jnp.asarray(item_ids)
        new, capacity = items.shape[1], cache.timestamps.shape[1]
        room = min(capacity, self.config.max_len)
        real = items != PADDING_ID
        lengths = cache.lengths + real.sum(1, dtype=jnp.int32)
        aligned = jnp.all(real[:, :-1] <= real[:, 1:], axis=1)
        lengths = jnp.where(aligned, jnp.minimum(lengths, room + 1), room + 1)
        position = lengths[:, None] - new + jnp.arange(new, dtype=jnp.int32)
        slots = jnp.where(real, position, capacity)
        arrivals = _Arrivals(real, slots, cache.timestamps, jnp.minimum(lengths, capacity))
        if timestamps is not None:
            times = arrivals.insert(cache.timestamps, jnp.asarray(timestamps))
            arrivals = arrivals._replace(timestamps=times)
        x, keys, values = self._embed(items, position), [], []
        for block, own_keys, own_values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x, own_keys, own_values = block.extend(x, own_keys, own_values, arrivals)
            keys.append(own_keys)
            values.append(own_values)
        hidden = jnp.where((lengths <= room)[:, None, None], self.norm(x), jnp.nan)
        return hidden, HSTUCache(tuple(keys), tuple(values), arrivals.timestamps, lengths)

    def moe_layers(self) -> list[MoELayer]:
        """The blocks' experts, in the order of their reports."""
        return [block.moe for block in self.blocks if block.moe is not None]

    def item_embeddings(self) -> Float[jax.Array, "V D"]:
        """Rows that hidden states are scored against; row 0 is padding."""
        return self.items.rows()
