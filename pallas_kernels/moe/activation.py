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


def nonlinear(activation: Activation, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(f(x), f'(x)): SiLU, or the tanh form of GELU; both are x times a sigmoid."""
    if activation == "geglu":
        square = x * x
        gate = 0.5 + 0.5 * jnp.tanh(_GELU_SLOPE * x * (1 + 0.044715 * square))
        slope = 2 * _GELU_SLOPE * (1 + 3 * 0.044715 * square)
    else:
        gate, slope = jax.nn.sigmoid(x), 1.0
    value = x * gate
    return value, gate + value * (1 - gate) * slope
