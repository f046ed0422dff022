"""The feed-forward network of a mixture of experts, trained without routed-token buffers.

Letters: T tokens, D width, E experts, H hidden width of an expert, K experts a token.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pallas_kernels._backend import Backend, resolve
from pallas_kernels.moe import ref
from pallas_kernels.moe.activation import ACTIVATIONS, Activation, is_gated
from pallas_kernels.moe.config import KERNEL_MULTIPLE, MoeConfig, kernel_problem
from pallas_kernels.moe.dispatch import moe_dispatch
from pallas_kernels.moe.ref import Experts
from pallas_kernels.moe.tuning import Layer, tuned_config

type Save = Literal["gate_up", "gate_up_fp8", "x"]

SAVES = ("gate_up", "gate_up_fp8", "x")

type _Array = jax.Array | np.ndarray


def moe_ffn(
    x: Float[_Array, "T D"],
    expert_ids: Int[_Array, "T K"],
    gates: Float[_Array, "T K"],
    w_gate: Float[_Array, "E D H"] | None,
    w_up: Float[_Array, "E D H"],
    w_down: Float[_Array, "E H D"],
    *,
    b_gate: Float[_Array, "E H"] | None = None,
    b_up: Float[_Array, "E H"] | None = None,
    b_down: Float[_Array, "E D"] | None = None,
    activation: Activation = "swiglu",
    save: Save = "gate_up",
    chunk_tokens: int | None = None,
    backend: Backend | None = None,
    config: MoeConfig | None = None,
) -> Float[jax.Array, "T D"]:
    """Each token's gate-weighted sum of its experts' outputs; no token is dropped.

        y[t] = Σ_k gates[t, k] · (f(gate) ⊙ up) · w_down[e] + gates[t, k] · b_down[e]
        gate = x[t] · w_gate[e] + b_gate[e],  up = x[t] · w_up[e] + b_up[e],  e = expert_ids[t, k]

    Products run in the dtype of x with f32 sums; gate and up are rounded to it before f. The
    kernels multiply f32 as six products of bf16 parts, right to 2^-23 of a product. Weights of
    another dtype are cast, and their gradients come in their own dtype.

    Args:
      x: f32 or bf16.
      expert_ids: an id outside 0 … E - 1 contributes nothing (for padding); see `moe_dispatch`.
      gates: weights of the experts, any finite values; used in f32.
      w_gate: None for activation "silu", which has no gate.
      activation: f is SiLU ("swiglu") or the tanh form of GELU ("geglu"); "silu" is silu(up).
      save: what is kept for the gradient beside the arguments. Bytes a token in bf16, x included:

          "gate_up"      2D + 4KH + 8K
          "gate_up_fp8"  2D + 2KH + 16K    gate and up in e4m3, with an f32 scale a row each
          "x"            2D + 8K           gate and up are computed anew, 4KDH FLOPs more

        (f32 doubles D and KH terms but those of fp8; "silu" has no gate: half the H terms and, in
        fp8, of the scales.) "x" and "gate_up" give the same gradients but for rounding.
      chunk_tokens: tokens whose gathered rows exist at once, in a kernel; the XLA backend gathers
        one tile at a time whatever it is. None takes all tokens at once.
      backend: "xla"; "mosaic_gpu" on Hopper, which fills D and H up to multiples of 128 with
        zeros if need be (copies of x and weights, and bytes kept, of these sizes); or None for
        the best supported. A name never falls back.
      config: tile sizes, and whether the kernels' forward pass gathers or fetches its rows; None
        takes what was measured best for such a layer (`tuned_config`), else the heuristic.

    Raises:
      ValueError: shapes or dtypes that do not fit, K > E, a gate missing or not wanted.

    Gradient: of x, gates, weights and biases; the ids' is none. Deterministic.
    Cost: 6KDH FLOPs a token forward and 12KDH backward (4KDH forward and 8KDH without a gate);
    transient memory one tile of rows, and f32 sums of y, dx and the weights' gradients.
    Source: MoEBlaze (arXiv 2601.05296); the gates' gradient after SonicMoE (arXiv 2512.14080).
    """
    experts = Experts(w_gate, w_up, w_down, b_gate, b_up, b_down)
    _check(x, expert_ids, gates, experts, activation, save, chunk_tokens)
    chosen = resolve("moe_ffn", backend, lambda: kernel_problem(x), wgmma=True)
    experts = jax.tree.map(jnp.asarray, experts)
    x, gates = jnp.asarray(x), jnp.asarray(gates)
    ids = jnp.asarray(expert_ids, jnp.int32)
    if ids.size == 0:
        return jnp.zeros_like(x)
    num_experts, width, hidden = w_up.shape
    layer = Layer(ids.size, num_experts, width, hidden, is_gated(activation))
    how = _How(activation, save, chunk_tokens, chosen, config or tuned_config(layer))
    if chosen == "mosaic_gpu":
        x, experts = filled_up(x, experts)
    y: Any = _ffn(x, ids, gates.astype(jnp.float32), experts, how)
    return y[:, :width]


def filled_up(x: jax.Array, experts: Experts) -> tuple[jax.Array, Experts]:
    """x and experts with D and H filled up to what the kernels take.

    Zeros change nothing: f(0) ⊙ 0 = 0 for every activation, and zero columns of w_down give zeros.
    """
    width, hidden = (-size % KERNEL_MULTIPLE for size in experts.w_up.shape[1:])
    if width == hidden == 0:
        return x, experts
    inner, outer = ((0, 0), (0, width), (0, hidden)), ((0, 0), (0, hidden), (0, width))
    room = (inner, inner, outer, inner[::2], inner[::2], outer[::2])
    filled: Any = (
        None if weight is None else jnp.pad(weight, sizes)
        for weight, sizes in zip(experts, room, strict=True)
    )
    return jnp.pad(x, inner[:2]), Experts(*filled)


def saved_bytes(
    num_tokens: int,
    width: int,
    hidden: int,
    slots: int,
    *,
    save: Save = "gate_up",
    activation: Activation = "swiglu",
    itemsize: int = 2,
) -> int:
    """Bytes that `moe_ffn` keeps from forward to backward beside weights: what `jax.vjp` holds."""
    matrices = 2 if is_gated(activation) else 1
    pairs = num_tokens * slots
    kept = {
        "gate_up": matrices * pairs * hidden * itemsize,
        "gate_up_fp8": matrices * pairs * (hidden + 4),
        "x": 0,
    }
    return num_tokens * width * itemsize + kept[save] + 8 * pairs


class _How(NamedTuple):
    """Static arguments."""

    activation: Activation
    save: Save
    chunk_tokens: int | None
    backend: Backend
    config: MoeConfig


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ffn(x, ids, gates, experts: Experts, how: _How):
    return _forward(x, ids, gates, experts, None, how)[0]


def _forward(x, ids, gates, experts, keep, how: _How) -> Any:
    if how.backend == "mosaic_gpu":
        from pallas_kernels.moe import mosaic_gpu  # 1 s of imports that the CPU never needs

        return mosaic_gpu.forward(
            x,
            ids,
            gates,
            experts,
            activation=how.activation,
            keep=keep,
            chunk_tokens=how.chunk_tokens,
            config=how.config,
        )
    dispatch = moe_dispatch(ids, num_experts=experts.w_up.shape[0])
    y, kept = ref.forward(
        x,
        dispatch,
        gates,
        experts,
        activation=how.activation,
        tile_rows=how.config.tile_rows,
        keep=keep,
    )
    return y.astype(x.dtype), kept


def _ffn_forward(x, ids, gates, experts, how: _How):
    keep = None if how.save == "x" else how.save
    y, kept = _forward(x, ids, gates, experts, keep, how)
    return y, (x, ids, gates, experts, kept)


def _ffn_backward(how: _How, residuals, dy):
    x, ids, gates, experts, kept = residuals
    if how.backend == "mosaic_gpu":
        from pallas_kernels.moe import mosaic_gpu_vjp

        dx, d_gates, d_experts = mosaic_gpu_vjp.backward(
            *residuals,
            dy,
            activation=how.activation,
            chunk_tokens=how.chunk_tokens,
            config=how.config,
        )
    else:
        # Rebuilt from the ids: cheaper than keeping the four structures.
        dispatch = moe_dispatch(ids, num_experts=experts.w_up.shape[0])
        dx, d_gates, d_experts = ref.backward(
            x,
            dispatch,
            gates,
            experts,
            kept,
            dy,
            activation=how.activation,
            tile_rows=how.config.tile_rows,
        )
    d_experts = jax.tree.map(lambda d, w: d.astype(w.dtype), d_experts, experts)
    return dx.astype(x.dtype), None, d_gates, d_experts


_ffn.defvjp(_ffn_forward, _ffn_backward)


def _check(x, expert_ids, gates, experts: Experts, activation, save, chunk_tokens) -> None:
    def fail(text: str):
        raise ValueError(f"moe_ffn: {text}")

    if activation not in ACTIVATIONS:
        fail(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if save not in SAVES:
        fail(f"save is {save!r}; expected one of {', '.join(SAVES)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        fail(f"chunk_tokens is {chunk_tokens}; expected at least 1")
    if is_gated(activation) and experts.w_gate is None:
        fail(f"activation {activation!r} needs w_gate; 'silu' works without")
    if not is_gated(activation) and (experts.w_gate is not None or experts.b_gate is not None):
        fail("activation 'silu' has no gate; pass w_gate=None and b_gate=None")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        fail(f"x is {x.dtype}; expected float32 or bfloat16")
    if expert_ids.shape != gates.shape or expert_ids.shape[0] != x.shape[0]:
        fail(
            f"x has {x.shape[0]} tokens, expert_ids shape {expert_ids.shape} and gates "
            f"{gates.shape}; expected [T, K] for both"
        )
    num_experts, width, hidden = experts.w_up.shape
    if width != x.shape[1]:
        fail(f"x is {x.shape[1]} wide and w_up takes {width}")
    if expert_ids.shape[1] > num_experts:
        fail(f"{expert_ids.shape[1]} experts a token, but only {num_experts} exist")
    inner, outer = (num_experts, width, hidden), (num_experts, hidden, width)
    shapes = (inner, inner, outer, inner[::2], inner[::2], outer[::2])
    for name, weight, shape in zip(Experts._fields, experts, shapes, strict=True):
        if weight is not None and weight.shape != shape:
            fail(f"{name} has shape {weight.shape}; w_up asks for {shape}")
