"""HSTU's pointwise (SiLU) attention over packed sequences."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels._backend import Backend, resolve
from pallas_kernels._sequences import checked_offsets
from pallas_kernels.hstu_attention.config import HstuConfig, kernel_problem
from pallas_kernels.hstu_attention.ref import Masking, hstu_attention_ref
from pallas_kernels.hstu_attention.tiles import ROW_MULTIPLE, Mask


def hstu_attention(
    q: Float[jax.Array, "T H Dqk"],
    k: Float[jax.Array, "T H Dqk"],
    v: Float[jax.Array, "T H Dv"],
    seq_offsets: Int[jax.Array, "B1"],
    *,
    max_len: int,
    alpha: float | None = None,
    attn_scale: float | Float[jax.Array, "T"] | Float[jax.Array, ""] | None = None,
    num_targets: Int[jax.Array, "B1-1"] | None = None,
    max_attn_len: int = 0,
    contextual_len: int = 0,
    min_full_attn_len: int = 0,
    position_bias: Float[jax.Array, "H {max_len}"] | None = None,
    timestamps: Int[jax.Array, "T"] | None = None,
    time_bias: Float[jax.Array, "H buckets"] | None = None,
    backend: Backend | None = None,
    config: HstuConfig | None = None,
) -> Float[jax.Array, "T H Dv"]:
    """Each token sums the earlier tokens of its own sequence, weighted without a softmax.

        out[t] = attn_scale · Σ_s silu(alpha · q[t]·k[s] + bias[t, s]) v[s]

    A sequence is contextual tokens, then history, then targets. A token attends to itself and

      history    to contextual tokens and earlier history;
      target     to contextual tokens and history, not to other targets;
      contextual to contextual tokens and history.

    Args:
      q, k, v: packed tokens; bf16 or f32; scores and sums are f32. The kernels multiply f32 as
        three bf16 parts of each value: within 2e-5 of float64, and gradients within 1e-4.
      seq_offsets: non-decreasing, starts at 0; slots behind `seq_offsets[-1]` give zeros.
      max_len: upper bound on the sequence lengths (static).
      alpha: factor on q·k; None means 1.
      attn_scale: factor on the sum, one for all or one a token; None means 1 / max_len.
      num_targets: how many of each sequence's last tokens are targets; at most its length without
        the contextual tokens.
      max_attn_len: 0, or how far back history and targets see: s is seen up to the distance
        max_attn_len. For distances, all contextual tokens stand in one place just before the
        history, and all targets in one place just behind it.
      contextual_len: how many of each sequence's first tokens are contextual. A sequence with
        fewer tokens is undefined.
      min_full_attn_len: with `max_attn_len`, targets and this many last tokens of the history see
        everything all the same.
      position_bias: added to the scores by distance t - s in slots; position_bias[:, 0] where a
        contextual token looks ahead.
      timestamps, time_bias: added by bucket floor(2·log2(1 + |seconds between|)), the last one for
        all that lie beyond; in any order, of any sign.
      backend: "xla"; "mosaic_gpu" on Hopper for widths that are multiples of 32 up to 256, in f32
        up to 256 together; or None for the best supported. A name never falls back.
      config: sizes of the kernels; the XLA backend has none.

    Raises:
      ValueError: max_len < 1, a negative length, one of timestamps and time_bias without the other;
        `BackendError` for a named backend that cannot run this call. Offsets that do not begin at
        0, decrease, end behind the slots, make a sequence longer than max_len or break the promise
        of `HstuConfig.aligned`; inside `jax.jit`, where values are unknown, the result is NaN.

    Gradient: of q, k, v, attn_scale and the biases; deterministic on the kernels.
    Cost: the kernels compute tiles of 64 × 64 pairs, 2·(Dqk + Dv) FLOPs a pair and head forward and
    2·(4·Dqk + 3·Dv) backward, six times as many in f32, and copy q, k, v and out once more than
    they must (`HstuConfig`).
    XLA: about 2·T·(max_len + 1.5·block)·H·(Dqk + Dv) FLOPs, twice that with contextual tokens,
    block = 16 … 128 near max_len / 2; or 2·B·max_len²·H·(Dqk + Dv), a block for each sequence,
    where that is less and max_len ≤ 256. Memory: 4·T·block·H bytes a matrix of scores, linear in T;
    the gradient keeps up to four of them (`UNROLL_LIMIT`) and recomputes longer bands.
    Source: HSTU (arXiv 2402.17152); the masks are those of generative-recommenders' operator.
    """
    check_arguments(max_len, max_attn_len, contextual_len, min_full_attn_len, timestamps, time_bias)

    chosen = resolve("hstu_attention", backend, lambda: kernel_problem(q, k, v), wgmma=True)
    scale = jnp.asarray(1 / max_len if attn_scale is None else attn_scale, jnp.float32)
    scale = scale[:, None, None] if scale.ndim else scale
    alpha = 1.0 if alpha is None else alpha
    mask = Mask(max_attn_len, contextual_len, min_full_attn_len)
    config = config or HstuConfig()
    seq_offsets, sound = checked_offsets(
        "hstu_attention",
        seq_offsets,
        num_tokens=q.shape[0],
        max_len=max_len,
        start_multiple=ROW_MULTIPLE if config.aligned else 1,
    )
    scale = jnp.where(sound, scale, jnp.nan)
    if chosen == "mosaic_gpu" and q.shape[0] and seq_offsets.shape[0] > 1:
        how = _How(max_len, alpha, mask, config)
        lists = _Lists(seq_offsets, num_targets, timestamps)
        unscaled: Any = _attend(q, k, v, position_bias, time_bias, lists, how)
        return (unscaled.astype(jnp.float32) * scale).astype(v.dtype)
    return hstu_attention_ref(
        q,
        k,
        v,
        seq_offsets,
        max_len=max_len,
        alpha=alpha,
        attn_scale=scale,
        masking=Masking(num_targets, *mask),
        position_bias=position_bias,
        timestamps=timestamps,
        time_bias=time_bias,
    )


def check_arguments(
    max_len: int,
    max_attn_len: int,
    contextual_len: int,
    min_full_attn_len: int,
    timestamps: Any,
    time_bias: Any,
) -> None:
    """Raises ValueError for what no backend can run."""
    if max_len < 1:
        raise ValueError(f"hstu_attention: max_len is {max_len}; expected at least 1")
    for name, value in (
        ("max_attn_len", max_attn_len),
        ("contextual_len", contextual_len),
        ("min_full_attn_len", min_full_attn_len),
    ):
        if value < 0:
            raise ValueError(f"hstu_attention: {name} is {value}; expected 0 (off) or more")
    if (time_bias is None) != (timestamps is None):
        raise ValueError("hstu_attention: give both timestamps and time_bias, or neither")


class _How(NamedTuple):
    """Static arguments of the kernels."""

    max_len: int
    alpha: float
    mask: Mask
    config: HstuConfig


class _Lists(NamedTuple):
    """Integer arguments, which have no gradient."""

    seq_offsets: jax.Array
    num_targets: jax.Array | None
    timestamps: jax.Array | None


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, position_bias, time_bias, lists: _Lists, how: _How) -> Any:
    """The op on the kernels, without its scale."""
    from pallas_kernels.hstu_attention import mosaic_gpu  # 1 s of imports that the CPU never needs

    return mosaic_gpu.forward(
        q,
        k,
        v,
        lists.seq_offsets,
        lists.num_targets,
        position_bias,
        lists.timestamps,
        time_bias,
        alpha=how.alpha,
        mask=how.mask,
        config=how.config,
    )


def _attend_forward(q, k, v, position_bias, time_bias, lists, how):
    inputs = (q, k, v, position_bias, time_bias, lists)
    return _attend(*inputs, how), inputs


def _attend_backward(how: _How, inputs, d_out):
    from pallas_kernels.hstu_attention import mosaic_gpu_vjp

    q, k, v, position_bias, time_bias, lists = inputs
    d_out = d_out.astype(v.dtype)
    gradients = mosaic_gpu_vjp.backward(
        q,
        k,
        v,
        lists.seq_offsets,
        lists.num_targets,
        position_bias,
        lists.timestamps,
        time_bias,
        d_out,
        max_len=how.max_len,
        alpha=how.alpha,
        mask=how.mask,
        config=how.config,
    )
    d_biases = (
        None if bias is None else gradient.astype(bias.dtype)
        for bias, gradient in zip((position_bias, time_bias), gradients[3:], strict=True)
    )
    return *gradients[:3], *d_biases, None


_attend.defvjp(_attend_forward, _attend_backward)
