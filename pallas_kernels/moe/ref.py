"""The XLA reference of `moe_ffn`: the definition of correct, and what runs without a kernel.

Forward and backward go through tiles of a few pairs of one expert. Only one tile's rows are ever
gathered, so neither routed inputs nor expert outputs exist as a whole. Sums over a token's experts
and over a weight's tokens are f32, in the order of experts: the same call gives the same bits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.moe.activation import Activation, activate, activate_gradient
from pallas_kernels.moe.dispatch import Dispatch, Tiles, group_tiles, in_expert_order

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0

type _Array = jax.Array | np.ndarray


class Experts(NamedTuple):
    """Weights of all experts; None for what they lack."""

    w_gate: Float[_Array, "E D H"] | None
    w_up: Float[_Array, "E D H"]
    w_down: Float[_Array, "E H D"]
    b_gate: Float[_Array, "E H"] | None
    b_up: Float[_Array, "E H"] | None
    b_down: Float[_Array, "E D"] | None


class Kept(NamedTuple):
    """What the forward pass leaves behind, row n for pair n: as it is, or (fp8 codes, scales)."""

    gate: Any
    up: Any


class _Rows(NamedTuple):
    """One tile: which pairs and tokens, and which of its rows are its own."""

    expert: Int32[Array, ""]
    start: Int32[Array, ""]
    own: Array
    tokens: Int32[Array, "r"]


def forward(
    x: Float[Array, "T D"],
    dispatch: Dispatch,
    gates: Float32[Array, "T K"],
    experts: Experts,
    *,
    activation: Activation,
    tile_rows: int,
    keep: str | None,
) -> tuple[Float32[Array, "T D"], Kept | None]:
    """(y, what `keep` asks for): "gate_up", "gate_up_fp8", or None for nothing."""
    tiles, tile_rows = _tiles(dispatch, tile_rows)
    own_gates = in_expert_order(gates, dispatch)
    num_pairs, hidden = own_gates.shape[0], experts.w_up.shape[2]

    def step(at, carry):
        y, kept = carry
        rows = _rows(tiles, at, dispatch, tile_rows, x.shape[0])
        mine = _expert(experts, rows.expert, x.dtype)
        gate, up = _gate_up(_take(x, rows), mine)
        activated = activate(activation, gate, up).astype(x.dtype)
        out = _matmul(activated, mine.w_down)
        out = out if mine.b_down is None else out + mine.b_down
        weight = lax.dynamic_slice_in_dim(own_gates, rows.start, tile_rows)
        y = y.at[rows.tokens].add(weight[:, None] * out, mode="drop")
        if keep is not None:
            kept = jax.tree.map(
                lambda store, new: _put(store, new, rows), kept, _encode(keep, gate, up)
            )
        return y, kept

    empty = None if keep is None else _empty(keep, experts.w_gate is not None, num_pairs, hidden, x)
    return lax.fori_loop(0, tiles.used, step, (jnp.zeros(x.shape, jnp.float32), empty))


def backward(
    x: Float[Array, "T D"],
    dispatch: Dispatch,
    gates: Float32[Array, "T K"],
    experts: Experts,
    kept: Kept | None,
    dy: Float[Array, "T D"],
    *,
    activation: Activation,
    tile_rows: int,
) -> tuple[Float32[Array, "T D"], Float32[Array, "T K"], Experts]:
    """(dx, d_gates, d_experts); gate and up are computed anew where they were not kept.

    The gate's gradient is ⟨dy · w_downᵀ, activated⟩ (+ ⟨dy, b_down⟩), so no expert output is
    needed.
    """
    tiles, tile_rows = _tiles(dispatch, tile_rows)
    own_gates = in_expert_order(gates, dispatch)
    dy = dy.astype(x.dtype)

    def step(at, carry):
        dx, d_own_gates, d_experts = carry
        rows = _rows(tiles, at, dispatch, tile_rows, x.shape[0])
        mine = _expert(experts, rows.expert, x.dtype)
        inputs, outer = _take(x, rows), _take(dy, rows)
        gate, up = _gate_up(inputs, mine) if kept is None else _decode(kept, rows, tile_rows)
        activated = activate(activation, gate, up).astype(x.dtype)
        d_activated = _matmul(outer, mine.w_down.T)
        d_gates = jnp.sum(d_activated * activated, axis=1)
        if mine.b_down is not None:
            d_gates += _matmul(outer, mine.b_down)
        weight = lax.dynamic_slice_in_dim(own_gates, rows.start, tile_rows)[:, None]
        d_gate, d_up = activate_gradient(activation, gate, up, weight * d_activated)
        # Rows of another expert are cleared before they meet a sum over rows.
        weighted = _own(weight * activated, rows).astype(x.dtype)
        d_up = _own(d_up, rows).astype(x.dtype)
        d_gate = None if d_gate is None else _own(d_gate, rows).astype(x.dtype)
        grads = Experts(
            None if d_gate is None else _matmul(inputs.T, d_gate),
            _matmul(inputs.T, d_up),
            _matmul(weighted.T, outer),
            None if d_gate is None or mine.b_gate is None else _row_sum(d_gate),
            None if mine.b_up is None else _row_sum(d_up),
            None if mine.b_down is None else _row_sum(_own(weight, rows) * outer),
        )
        d_inputs = _matmul(d_up, mine.w_up.T)
        if d_gate is not None and mine.w_gate is not None:
            d_inputs += _matmul(d_gate, mine.w_gate.T)
        return (
            dx.at[rows.tokens].add(d_inputs, mode="drop"),
            _put(d_own_gates, d_gates, rows),
            jax.tree.map(lambda all_, own: all_.at[rows.expert].add(own), d_experts, grads),
        )

    start = (
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros_like(own_gates),
        jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), experts),
    )
    dx, d_own_gates, d_experts = lax.fori_loop(0, tiles.used, step, start)
    places = dispatch.token_index_map
    d_gates = jnp.where(places >= 0, d_own_gates[jnp.maximum(places, 0)], 0)
    return dx, d_gates, d_experts


def _tiles(dispatch: Dispatch, tile_rows: int) -> tuple[Tiles, int]:
    num_pairs = dispatch.expert_token_indices.shape[0]
    tile_rows = min(tile_rows, num_pairs)
    return group_tiles(dispatch.expert_token_offsets, num_pairs, tile_rows), tile_rows


def _rows(tiles: Tiles, at, dispatch: Dispatch, tile_rows: int, num_tokens: int) -> _Rows:
    """A tile near the end starts earlier than its pairs, so that it stays inside the arrays."""
    first = tiles.start[at]
    start = jnp.minimum(first, dispatch.expert_token_indices.shape[0] - tile_rows)
    pairs = start + jnp.arange(tile_rows, dtype=jnp.int32)
    own = (pairs >= first) & (pairs < first + tiles.size[at])
    tokens = lax.dynamic_slice_in_dim(dispatch.expert_token_indices, start, tile_rows)
    return _Rows(tiles.expert[at], start, own, jnp.where(own, tokens, num_tokens))


def _expert(experts: Experts, at, dtype) -> Experts:
    return jax.tree.map(lambda w: w[at].astype(dtype), experts)


def _take(x: Array, rows: _Rows) -> Array:
    return x.at[rows.tokens].get(mode="fill", fill_value=0)


def _own(values: Array, rows: _Rows) -> Array:
    return jnp.where(rows.own[:, None], values, 0)


def _put(store: Array, values: Array, rows: _Rows) -> Array:
    """Writes the tile's own rows."""
    old = lax.dynamic_slice_in_dim(store, rows.start, values.shape[0])
    own = rows.own.reshape(-1, *[1] * (values.ndim - 1))
    new = jnp.where(own, values.astype(store.dtype), old)
    return lax.dynamic_update_slice_in_dim(store, new, rows.start, axis=0)


def _matmul(a: Array, b: _Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _row_sum(values: Array) -> Array:
    return jnp.sum(values.astype(jnp.float32), axis=0)


def _gate_up(inputs: Array, expert: Experts) -> tuple[Array | None, Array]:
    """Both projections, rounded to the inputs' dtype as they are kept."""

    def project(weight, bias):
        out = _matmul(inputs, weight)
        return (out if bias is None else out + bias).astype(inputs.dtype)

    gate = None if expert.w_gate is None else project(expert.w_gate, expert.b_gate)
    return gate, project(expert.w_up, expert.b_up)


def _empty(keep: str, gated: bool, num_pairs: int, hidden: int, x: Array) -> Kept:
    def store():
        if keep == "gate_up":
            return jnp.zeros((num_pairs, hidden), x.dtype)
        return jnp.zeros((num_pairs, hidden), FP8), jnp.zeros(num_pairs, jnp.float32)

    return Kept(store() if gated else None, store())


def _encode(keep: str, gate: Array | None, up: Array) -> Kept:
    if keep == "gate_up":
        return Kept(gate, up)
    return Kept(None if gate is None else to_fp8(gate), to_fp8(up))


def _decode(kept: Kept, rows: _Rows, tile_rows: int) -> tuple[Array | None, Array]:
    def read(store: Any) -> Any:
        if store is None:
            return None
        if not isinstance(store, tuple):
            return lax.dynamic_slice_in_dim(store, rows.start, tile_rows)
        codes, scales = (lax.dynamic_slice_in_dim(s, rows.start, tile_rows) for s in store)
        return codes.astype(jnp.float32) * scales[:, None]

    return read(kept.gate), read(kept.up)


def to_fp8(values: Float[Array, "n H"]) -> tuple[Array, Float32[Array, "n"]]:
    """(codes in e4m3, f32 scales): values ≈ codes · scales, with a scale for each row."""
    values = values.astype(jnp.float32)
    largest = jnp.max(jnp.abs(values), axis=1)
    scales = jnp.where(largest > 0, largest / FP8_MAX, 1)
    return (values / scales[:, None]).astype(FP8), scales
