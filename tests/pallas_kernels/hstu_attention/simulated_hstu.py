"""The op with its kernels named, whatever the device: for the simulator."""

import jax
import jax.numpy as jnp

from pallas_kernels.hstu_attention import api, mosaic_gpu, mosaic_gpu_cached
from pallas_kernels.hstu_attention.tiles import Shape


def value_and_gradients(q, k, v, position_bias, time_bias, lists, d_out, how):
    """(out, gradients of q, k, v and the biases) as the op differentiates, but on the kernels."""
    lists, how = api._Lists(*lists), api._How(*how)
    out, pull = jax.vjp(
        lambda *args: api._attend(*args, lists, how), q, k, v, position_bias, time_bias
    )
    return out, *pull(d_out)


def whole_and_cached(arrays, cached, num_targets, *, alpha, mask, config):
    """Both forms of the forward pass, without their scale."""
    arrays, cached = (jax.tree.map(jnp.asarray, x) for x in (arrays, cached))
    biases = ("position_bias", "timestamps", "time_bias")
    whole = mosaic_gpu.forward(
        *(arrays[name] for name in ("q", "k", "v", "seq_offsets")),
        num_targets,
        *(arrays[name] for name in biases),
        alpha=alpha,
        mask=mask,
        config=config,
    )
    lengths = cached["lengths"]
    history_end = lengths if num_targets is None else lengths - num_targets
    own = mosaic_gpu_cached.forward(
        *(cached[name] for name in ("q", "k", "v")),
        Shape(lengths, history_end),
        *(cached[name] for name in biases),
        alpha=alpha,
        mask=mask,
        config=config,
    )
    return whole, own
