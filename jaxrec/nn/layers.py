"""Building blocks with parameters: linear maps, norms, item embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from jaxrec.ops.layers import layer_norm
from jaxrec.typing import PADDING_ID


class Linear(nnx.Module):
    """x @ kernel (+ bias); parameters f32, computed in the dtype of x."""

    def __init__(
        self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, bias: bool = True, std: float = 0.02
    ):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (fan_in, fan_out)))
        self.bias = nnx.Param(jnp.zeros(fan_out)) if bias else None

    def __call__(self, x: Float[jax.Array, "*rows fan_in"]) -> Float[jax.Array, "*rows fan_out"]:
        """x @ kernel + bias, in the dtype of x."""
        out = x @ self.kernel[...].astype(x.dtype)
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """`layer_norm` with a learned scale and bias."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[jax.Array, "*rows D"]) -> Float[jax.Array, "*rows D"]:
        """Rows of mean 0 and variance 1, scaled and shifted."""
        return layer_norm(x, self.scale[...], self.bias[...])


class ItemRows(nnx.Param):
    """One row an item: weights of which a step needs few, so that an optimizer may tell them."""


class ItemAttributeIds(nnx.Variable):
    """Which attributes each item has: data that belongs to a model, never trained."""


class ItemEmbedding(nnx.Module):
    """One f32 row an item, plus the mean of its attributes' rows; row 0 is padding, all zeros.

    Args:
      num_items: items, numbered from 1.
      num_attributes: different attributes, numbered from 1; 0 for none.
      attribute_slots: attributes of an item at most.
      attribute_ids: numbers of each item's attributes, padded with 0; i32[V, attribute_slots].
        None leaves them all 0, for weights that are about to be restored.
    """

    def __init__(
        self,
        num_items: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        std: float = 0.02,
        num_attributes: int = 0,
        attribute_slots: int = 0,
        attribute_ids: Int[jax.Array | np.ndarray, "V slots"] | None = None,
    ):
        rows = std * jax.random.normal(rngs.params(), (num_items + 1, width))
        self.table = ItemRows(rows.at[PADDING_ID].set(0))
        self.attribute_table = self.attribute_ids = nnx.data(None)
        if num_attributes:
            rows = std * jax.random.normal(rngs.params(), (num_attributes + 1, width))
            self.attribute_table = nnx.Param(rows.at[PADDING_ID].set(0))
            shape = (num_items + 1, attribute_slots)
            ids = np.zeros(shape, np.int32) if attribute_ids is None else np.asarray(attribute_ids)
            if ids.shape != shape or ids.min() < 0 or ids.max() > num_attributes:
                raise ValueError(
                    f"attribute_ids has shape {ids.shape} and values {ids.min()} to {ids.max()}; "
                    f"expected shape {shape} and values 0 to {num_attributes}"
                )
            self.attribute_ids = ItemAttributeIds(jnp.asarray(ids, jnp.int32))

    def rows(self) -> Float[jax.Array, "V D"]:
        """Every item's row."""
        return self._with_attributes(self.table[...], slice(None))

    def __call__(self, item_ids: Int[jax.Array, "*ids"]) -> Float[jax.Array, "*ids D"]:
        """The items' rows; zeros for padding."""
        rows = self._with_attributes(self.table[...][item_ids], item_ids)
        return jnp.where((item_ids != PADDING_ID)[..., None], rows, 0)

    def _with_attributes(self, rows: jax.Array, items: jax.Array | slice) -> jax.Array:
        if self.attribute_table is None or self.attribute_ids is None:
            return rows
        ids = self.attribute_ids[...][items]
        table = self.attribute_table[...].at[PADDING_ID].set(0)
        # Slot by slot, so that the sum is one pass: no array of all slots' rows exists.
        total = sum((table[ids[..., slot]] for slot in range(1, ids.shape[-1])), table[ids[..., 0]])
        return rows + total / jnp.maximum((ids != PADDING_ID).sum(-1, keepdims=True), 1)
