"""Inputs of the MoE op, and what it should compute, in float64 and expert by expert."""

from typing import Any

import numpy as np

WEIGHTS = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")
DIFFERENTIABLE = ("x", "gates", *WEIGHTS)


def distinct_experts(rng: np.random.Generator, tokens: int, slots: int, experts: int) -> np.ndarray:
    """Each token's own experts, in random order."""
    return np.argsort(rng.random((tokens, experts)), axis=1)[:, :slots].astype(np.int32)


def inputs(
    seed: int,
    tokens: int,
    width: int,
    hidden: int,
    experts: int,
    slots: int,
    *,
    bias: bool = False,
    gated: bool = True,
) -> dict[str, Any]:
    """Arguments of `moe_ffn` with outputs of about 1; None for what is missing."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    inner, outer = (experts, width, hidden), (experts, hidden, width)
    return {
        "x": normal(tokens, width),
        "expert_ids": distinct_experts(rng, tokens, slots, experts),
        "gates": rng.random((tokens, slots)).astype(np.float32),
        "w_gate": normal(*inner) / width**0.5 if gated else None,
        "w_up": normal(*inner) / width**0.5,
        "w_down": normal(*outer) / hidden**0.5,
        "b_gate": normal(experts, hidden) if bias and gated else None,
        "b_up": normal(experts, hidden) if bias else None,
        "b_down": normal(experts, width) if bias else None,
    }


def published(seed: int, tokens: int, width: int, slots: int, *, bias: bool) -> dict[str, Any]:
    """ScatterMoE's correctness test: 8 experts, H = 4D/K, a softmax's gates, an initialised layer.

    Its weights have a deviation of 0.02 and its biases are 0. Ours are harder to get right within
    an absolute bound: all have that of their fan-in, 0.04 to 0.1.
    """
    experts, hidden = 8, 4 * width // slots
    case = inputs(seed, tokens, width, hidden, experts, slots, bias=bias)
    scores = np.exp(np.random.default_rng(seed).standard_normal((tokens, experts)))
    shares = (scores / scores.sum(1, keepdims=True)).astype(np.float32)
    ids = np.argsort(-shares, axis=1)[:, :slots].astype(np.int32)
    case |= {"expert_ids": ids, "gates": np.take_along_axis(shares, ids, axis=1)}
    for name, fan_in in {"b_gate": width, "b_up": width, "b_down": hidden}.items():
        case[name] = case[name] / np.float32(fan_in**0.5) if bias else None
    return case


def _nonlinear(activation: str, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if activation == "geglu":
        slope = np.sqrt(2 / np.pi)
        tanh = np.tanh(slope * (z + 0.044715 * z**3))
        inner = slope * (1 + 3 * 0.044715 * z**2)
        return 0.5 * z * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * inner
    sigmoid = 1 / (1 + np.exp(-z))
    return z * sigmoid, sigmoid + z * sigmoid * (1 - sigmoid)


def expected(
    case: dict[str, Any], dy: np.ndarray, activation: str = "swiglu"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(y, gradients of Σ y·dy) in float64."""
    wide: dict[str, Any] = {
        k: None if v is None else np.asarray(v, np.float64) for k, v in case.items()
    }
    x, gates, dy = wide["x"], wide["gates"], dy.astype(np.float64)
    grads = {k: np.zeros_like(wide[k]) for k in DIFFERENTIABLE if wide[k] is not None}
    y = np.zeros_like(x)

    def part(name, expert) -> np.ndarray:
        return np.zeros(1) if wide[name] is None else wide[name][expert]

    for expert in range(len(case["w_up"])):
        tokens, slots = np.nonzero(case["expert_ids"] == expert)
        rows, outer, weight = x[tokens], dy[tokens], gates[tokens, slots][:, None]
        up = rows @ part("w_up", expert) + part("b_up", expert)
        if wide["w_gate"] is None:
            hidden, slope = _nonlinear("silu", up)
            value = None
        else:
            gate = rows @ part("w_gate", expert) + part("b_gate", expert)
            value, slope = _nonlinear(activation, gate)
            hidden = value * up
        out = hidden @ part("w_down", expert) + part("b_down", expert)
        np.add.at(y, tokens, weight * out)
        grads["gates"][tokens, slots] = (out * outer).sum(1)
        d_hidden = (weight * outer) @ part("w_down", expert).T
        own = {"w_down": hidden.T @ (weight * outer), "b_down": (weight * outer).sum(0)}
        if value is None:
            d_up = d_hidden * slope
        else:
            d_up, d_gate = d_hidden * value, d_hidden * up * slope
            own |= {"w_gate": rows.T @ d_gate, "b_gate": d_gate.sum(0)}
            np.add.at(grads["x"], tokens, d_gate @ part("w_gate", expert).T)
        own |= {"w_up": rows.T @ d_up, "b_up": d_up.sum(0)}
        np.add.at(grads["x"], tokens, d_up @ part("w_up", expert).T)
        for name, value_ in own.items():
            if name in grads:
                grads[name][expert] += value_
    return y, grads
