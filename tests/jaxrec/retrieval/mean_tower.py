"""A tiny user tower: the running mean of the sequence's item embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.ops.jagged import JaggedBatch, segment_ids


class MeanTower(nnx.Module):
    def __init__(self, num_rows: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (num_rows, width)))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def encode(self, batch: JaggedBatch, *, deterministic: bool = True):
        tokens = self.table[jnp.asarray(batch.item_ids)]
        segments = segment_ids(batch.seq_offsets, len(batch.item_ids))
        slots = jnp.arange(len(batch.item_ids))
        same = (segments[:, None] == segments) & (slots <= slots[:, None])
        weights = same / jnp.sum(same, axis=1, keepdims=True)
        return self.dropout(weights @ tokens, deterministic=deterministic)

    def item_embeddings(self):
        return self.table[...]
