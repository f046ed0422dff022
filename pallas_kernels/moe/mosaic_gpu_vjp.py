"""The backward pass of `moe_ffn` beside the kernels of `mosaic_gpu`."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels.moe import ref
from pallas_kernels.moe.activation import Activation
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.dispatch import moe_dispatch
from pallas_kernels.moe.mosaic_gpu import Chunks, join_chunks, map_chunks
from pallas_kernels.moe.ref import Experts


@functools.partial(jax.jit, static_argnames=("activation", "chunk_tokens", "config"))
def backward(
    x: BFloat16[Array, "T D"],
    ids: Int32[Array, "T K"],
    gates: Float32[Array, "T K"],
    experts: Experts,
    kept: Chunks | None,
    dy: BFloat16[Array, "T D"],
    *,
    activation: Activation,
    chunk_tokens: int | None,
    config: MoeConfig,
) -> tuple[Float32[Array, "T D"], Float32[Array, "T K"], Experts]:
    """(dx, d_gates, d_experts) from what `mosaic_gpu.forward` kept; chunk after chunk."""

    def chunk(d_experts, part):
        x, ids, gates, dy, kept = part
        dx, d_gates, new = ref.backward(
            x,
            moe_dispatch(ids, num_experts=experts.w_up.shape[0]),
            gates,
            experts,
            kept if kept.up is not None else None,
            dy,
            activation=activation,
            tile_rows=config.tile_rows,
        )
        return jax.tree.map(jnp.add, d_experts, new), (dx, d_gates)

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), experts)
    d_experts, results = map_chunks(chunk, zeros, (x, ids, gates, dy), chunk_tokens, kept)
    dx, d_gates = join_chunks(results)
    return dx, d_gates, d_experts
