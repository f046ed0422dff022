"""What stands between the two matrix products of an expert, and its gradient; in f32."""

from typing import Literal

import jax
import jax.numpy as jnp

type Activation = Literal["swiglu", "geglu", "silu"]

ACTIVATIONS = ("swiglu", "geglu", "silu")
_GELU_SLOPE = (2 / jnp.pi) ** 0.5


def is_gated(activation: Activation) -> bool:
    """Whether there is a gate beside the up projection."""
    return activation != "silu"


def activate(activation: Activation, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """f(gate) · up, or silu(up) where there is no gate; f32."""
    up = up.astype(jnp.float32)
    if gate is None:
        return jax.nn.silu(up)
    return nonlinear(activation, gate.astype(jnp.float32))[0] * up


def activate_gradient(
    activation: Activation, gate: jax.Array | None, up: jax.Array, d_hidden: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """(d_gate, d_up) from the gradient of `activate`'s result; f32."""
    up = up.astype(jnp.float32)
    if gate is None:
        return None, d_hidden * nonlinear("swiglu", up)[1]
    value, slope = nonlinear(activation, gate.astype(jnp.float32))
    return d_hidden * up * slope, d_hidden * value


def scaled_nonlinear(
    activation: Activation, x: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(f(x), scale · f(x), scale · f'(x)), in few instructions: a kernel's epilogue lives on it.

    With f(x) = x · s and s = (1 + tanh t) / 2, a sigmoid needs no division, f and f' share their
    `tanh`, and the scale comes with s at no cost.
    """
    half, half_scale = 0.5 * x, 0.5 * scale
    tanh = jnp.tanh(_gelu_argument(x) if activation == "geglu" else half)
    scaled_sigmoid = half_scale + half_scale * tanh
    scaled_value = x * scaled_sigmoid
    rest = 0.5 - 0.5 * tanh  # 1 - s
    if activation == "geglu":
        rest *= _gelu_slope(x)
    return half + half * tanh, scaled_value, scaled_sigmoid + scaled_value * rest


def nonlinear(activation: Activation, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(f(x), f'(x)): SiLU, or the tanh form of GELU; both are x times a sigmoid."""
    if activation == "geglu":
        gate, slope = 0.5 + 0.5 * jnp.tanh(_gelu_argument(x)), _gelu_slope(x)
    else:
        gate, slope = jax.nn.sigmoid(x), 1.0
    value = x * gate
    return value, gate + value * (1 - gate) * slope


def _gelu_argument(x: jax.Array) -> jax.Array:
    """t of GELU's tanh form, x · (1 + tanh t) / 2."""
    return x * (_GELU_SLOPE + _GELU_SLOPE * 0.044715 * (x * x))


def _gelu_slope(x: jax.Array) -> jax.Array:
    """2 dt/dx."""
    return 2 * _GELU_SLOPE + 6 * _GELU_SLOPE * 0.044715 * (x * x)
