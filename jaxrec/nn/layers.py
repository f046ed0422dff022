"""Building blocks with parameters: linear maps, norms, item embeddings."""

import jax
import jax.numpy as jnp
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


class ItemEmbedding(nnx.Module):
    """One f32 row an item; row 0 is padding and reads as zeros."""

    def __init__(self, num_items: int, width: int, *, rngs: nnx.Rngs, std: float = 0.02):
        rows = std * jax.random.normal(rngs.params(), (num_items + 1, width))
        self.table = nnx.Param(rows.at[PADDING_ID].set(0))

    def __call__(self, item_ids: Int[jax.Array, "*ids"]) -> Float[jax.Array, "*ids D"]:
        """The items' rows; zeros for padding."""
        rows = self.table[...][item_ids]
        return jnp.where((item_ids != PADDING_ID)[..., None], rows, 0)
