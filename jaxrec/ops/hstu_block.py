"""An HSTU block as one operation, which tells how much it keeps for its gradient.

    z = norm(x)·W + b                      u, v, q, k = silu(z)
    a = attention(q, k, v)                 y = x + dropout(norm(a) ⊙ u)·W_out + b_out

Letters: T tokens, D width, H heads, P = 2·H·(qk_width + v_width) columns of z, A = H·v_width of a.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from jaxrec.ops.layers import dropout, layer_norm
from pallas_kernels import hstu_attention

type Save = Literal["projections", "attended", "x"]
SAVES = ("projections", "attended", "x")


class HSTUWeights(NamedTuple):
    """Weights of a block; f32, used in the dtype of x.

    Attributes:
      scale, bias: of the first norm; [D].
      w_uvqk, b_uvqk: [D, P] and [P]; columns are u, v, q, k, each by heads.
      w_out, b_out: [A, D] and [D].
      position_bias, time_bias: of `pallas_kernels.hstu_attention`; the latter may be None.
    """

    scale: Float[jax.Array, "D"]
    bias: Float[jax.Array, "D"]
    w_uvqk: Float[jax.Array, "D P"]
    b_uvqk: Float[jax.Array, "P"]
    w_out: Float[jax.Array, "A D"]
    b_out: Float[jax.Array, "D"]
    position_bias: Float[jax.Array, "H L"]
    time_bias: Float[jax.Array, "H buckets"] | None = None


@dataclass(frozen=True)
class HSTUShape:
    """Static sizes of a block, and the share of its gated output that dropout zeros."""

    heads: int
    qk_width: int
    v_width: int
    max_len: int
    dropout: float = 0.0

    @property
    def gate_columns(self) -> int:
        """A: columns of u, of v, and of the attention's output."""
        return self.heads * self.v_width


def hstu_block(
    x: Float[jax.Array, "T D"],
    weights: HSTUWeights,
    seq_offsets: Int[jax.Array, "B1"],
    *,
    shape: HSTUShape,
    timestamps: Int[jax.Array, "T"] | None = None,
    key: jax.Array | None = None,
    save: Save | None = "projections",
) -> Float[jax.Array, "T D"]:
    """The block's output for every token slot, in the dtype of x.

    Args:
      x: bf16 or f32, packed as `seq_offsets` says.
      timestamps: with a time bias; see `pallas_kernels.hstu_attention`.
      key: for dropout; None leaves it out.
      save: what is kept for the gradient, beside arguments (`hstu_block_saved_bytes`):
          "projections"  z and a; the gradient repeats elementwise work and the attention's scores
          "attended"     a; and the product that makes z, 2·T·D·P FLOPs
          "x"            nothing; and the attention
        None leaves the choice to automatic differentiation, which repeats nothing but keeps several
        times as much; measured on a CPU, training steps took longer so.

    Raises:
      ValueError: save is none of these; else as `hstu_attention`.

    Cost: 2·T·D·(P + A) FLOPs and those of the attention; twice that again for the gradient. Dropout
    draws the same numbers whatever is saved.
    """
    if save is not None and save not in SAVES:
        raise ValueError(f"hstu_block: save is {save!r}; expected None or one of {SAVES}")
    arrays = _Arrays(seq_offsets, timestamps, key)
    if save is None:
        return _run(x, weights, arrays, shape)[0]
    return _block(x, weights, arrays, (shape, save))


def hstu_block_saved_bytes(
    num_tokens: int, width: int, shape: HSTUShape, *, save: Save, itemsize: int
) -> int:
    """Bytes that `hstu_block` keeps for its gradient: x, and what `save` adds.

    Weights, offsets, timestamps and key, which exist anyway, are left out.
    """
    gates = shape.gate_columns
    projections = 2 * gates + 2 * shape.heads * shape.qk_width
    kept = {"projections": projections + gates, "attended": gates, "x": 0}
    return num_tokens * itemsize * (width + kept[save])


def project(x: Float[jax.Array, "*rows D"], weights: HSTUWeights) -> Float[jax.Array, "*rows P"]:
    """z, before its SiLU."""
    normed = layer_norm(x, weights.scale, weights.bias)
    return normed @ weights.w_uvqk.astype(x.dtype) + weights.b_uvqk.astype(x.dtype)


def split_heads(
    vqk: Float[jax.Array, "*rows V"], shape: HSTUShape
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v, q and k by heads from their columns of z."""
    ends = (shape.gate_columns, shape.gate_columns + shape.heads * shape.qk_width)
    parts = jnp.split(jax.nn.silu(vqk), ends, axis=-1)
    v, q, k = (part.reshape(*vqk.shape[:-1], shape.heads, -1) for part in parts)
    return v, q, k


def finish(
    x: Float[jax.Array, "*rows D"],
    u: Float[jax.Array, "*rows A"],
    attended: Float[jax.Array, "*rows A"],
    weights: HSTUWeights,
    *,
    rate: float | int = 0.0,
    key: jax.Array | None = None,
) -> Float[jax.Array, "*rows D"]:
    """y; `u` is its columns of z."""
    gated = dropout(layer_norm(attended) * jax.nn.silu(u), rate, key)
    return x + (gated @ weights.w_out.astype(x.dtype) + weights.b_out.astype(x.dtype))


class _Arrays(NamedTuple):
    """Arguments without a gradient."""

    seq_offsets: jax.Array
    timestamps: jax.Array | None
    key: jax.Array | None


def _attend(vqk, position_bias, time_bias, arrays: _Arrays, shape: HSTUShape) -> jax.Array:
    v, q, k = split_heads(vqk, shape)
    attended = hstu_attention(
        q,
        k,
        v,
        arrays.seq_offsets,
        max_len=shape.max_len,
        position_bias=position_bias,
        timestamps=arrays.timestamps,
        time_bias=time_bias,
    )
    return attended.reshape(vqk.shape[0], -1)


def _run(x, weights: HSTUWeights, arrays: _Arrays, shape: HSTUShape):
    """(y, z, a)."""
    z = project(x, weights)
    u, vqk = z[:, : shape.gate_columns], z[:, shape.gate_columns :]
    attended = _attend(vqk, weights.position_bias, weights.time_bias, arrays, shape)
    y = finish(x, u, attended, weights, rate=shape.dropout, key=arrays.key)
    return y, z, attended


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _block(x, weights: HSTUWeights, arrays: _Arrays, how: tuple[HSTUShape, Save]):
    return _run(x, weights, arrays, how[0])[0]


def _forward(x, weights, arrays, how):
    shape, save = how
    y, z, attended = _run(x, weights, arrays, shape)
    kept_z = z if save == "projections" else None
    kept_attended = None if save == "x" else attended
    return y, (x, weights, arrays, kept_z, kept_attended)


def _backward(how, kept, dy):
    shape, _ = how
    # Without the barrier the compiler would see that the forward pass computes the same, dropout's
    # mask included, and keep that instead.
    x, weights, arrays, z, attended = kept
    x, key, z, attended, dy = lax.optimization_barrier((x, arrays.key, z, attended, dy))
    if z is None:
        z = project(x, weights)
    u, vqk = z[:, : shape.gate_columns], z[:, shape.gate_columns :]

    def attend(vqk, position_bias, time_bias):
        return _attend(vqk, position_bias, time_bias, arrays, shape)

    biases = weights.position_bias, weights.time_bias
    recomputed, pull_attention = jax.vjp(attend, vqk, *biases)
    attended = recomputed if attended is None else attended
    end = partial(finish, rate=shape.dropout, key=key)
    _, pull_end = jax.vjp(end, x, u, attended, weights)
    dx, du, d_attended, d_end = pull_end(dy)
    dvqk, *d_biases = pull_attention(d_attended)
    _, pull_project = jax.vjp(project, x, weights)
    dx_project, d_project = pull_project(jnp.concatenate([du, dvqk], axis=-1))
    d_weights = HSTUWeights(
        d_project.scale,
        d_project.bias,
        d_project.w_uvqk,
        d_project.b_uvqk,
        d_end.w_out,
        d_end.b_out,
        *d_biases,
    )
    return dx + dx_project, d_weights, None


_block.defvjp(_forward, _backward)
