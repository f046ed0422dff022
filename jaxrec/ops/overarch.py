"""What scores a query against its candidates beyond the dot product: mixtures and attention.

M queries, K0 candidates of each, U and X components of a query and of an item, P = U·X pairs.
Candidate arrays lead with [M, K0], or with [1, K0] where all queries share them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

MAX_SCORES = 1 << 22
"""Attention weights that `candidate_attention` holds at once (16 MiB in f32)."""


class CrossGate(NamedTuple):
    """Weights of the network P → G → P that gates by the component logits themselves."""

    up: Float[Array, "P G"]
    bias: Float[Array, "G"]
    down: Float[Array, "G P"]


def l2_normalise(x: Float[Array, "*rows D"], *, eps: float = 1e-6) -> Float[Array, "*rows D"]:
    """x / √(‖x‖² + eps²): rows of length 1, zeros for zeros, gradients finite everywhere."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt((x32 * x32).sum(-1, keepdims=True) + eps**2)).astype(x.dtype)


def dot_scores(
    query: Float[Array, "M D"], items: Float[Array, "M1 K0 D"]
) -> Float32[Array, "M K0"]:
    """Inner products of each query with its candidates (M1 is M, or 1 for shared ones)."""
    formula, items = ("md,kd->mk", items[0]) if items.shape[0] == 1 else ("md,mkd->mk", items)
    return jnp.einsum(formula, query, items, preferred_element_type=jnp.float32)


def mixture_of_logits(
    query_parts: Float[Array, "M U W"],
    query_gate: Float[Array, "M P"],
    item_parts: Float[Array, "M1 K0 X W"],
    item_gate: Float[Array, "M1 K0 P"],
    cross_gate: CrossGate,
    *,
    temperature: float | int,
) -> Float32[Array, "M K0"]:
    """Dot products of all component pairs, weighed by a gate that sees query, item and pair.

        logit[p = (u, x)] = ⟨query_parts[u], item_parts[x]⟩ / temperature
        gate = softmax_p(silu(query_gate · item_gate + cross_gate(logit)))
        score = Σ_p gate[p] · logit[p]

    A mixture of P low-rank scores whose weights depend on query and item approximates any
    similarity matrix, unlike one dot product, whose matrix has rank W.

    Args:
      query_parts, item_parts: with l2-normalised rows the logits are cosines / temperature.
      query_gate, item_gate: the gate's terms that need only one side, so may be cached.

    Cost: 2·P·(W + 2·G) FLOPs a candidate; memory M·K0·(P + G) values.
    Source: Zhai et al., Revisiting Neural Retrieval on Accelerators (KDD 2023); Ding & Zhai,
    Retrieval with Learned Similarities (WWW 2025).
    """
    shared = item_parts.shape[0] == 1
    logits = jnp.einsum(
        "muw,kxw->mkux" if shared else "muw,mkxw->mkux",
        query_parts,
        item_parts[0] if shared else item_parts,
        preferred_element_type=jnp.float32,
    )
    logits = logits.reshape(*logits.shape[:2], -1) / temperature
    hidden = jax.nn.silu(logits @ cross_gate.up + cross_gate.bias)
    gate = query_gate[:, None] * item_gate + hidden @ cross_gate.down
    return (jax.nn.softmax(jax.nn.silu(gate.astype(jnp.float32)), axis=-1) * logits).sum(-1)


def candidate_attention(
    q: Float[Array, "M K0 H W"],
    k: Float[Array, "M K0 H W"],
    v: Float[Array, "M K0 H W"],
    valid: Bool[Array, "M K0"],
    *,
    max_scores: int = MAX_SCORES,
) -> Float[Array, "M K0 H W"]:
    """Softmax attention among each query's valid candidates; zeros where none is valid.

    Args:
      max_scores: attention weights held at once (static); candidates take their turns in equal
        chunks. They are computed anew for gradients.

    Cost: 4·M·K0²·H·W FLOPs; memory max(max_scores, M·H·K0) weights.
    """
    num_queries, num_candidates, heads, width = q.shape
    row = max(1, num_queries * heads * num_candidates)
    num_chunks = max(1, -(-num_candidates // max(1, max_scores // row)))
    chunk = -(-num_candidates // num_chunks)
    padded = jnp.pad(q, ((0, 0), (0, num_chunks * chunk - num_candidates), (0, 0), (0, 0)))
    chunks = padded.reshape(num_queries, num_chunks, chunk, heads, width).swapaxes(0, 1)

    @jax.checkpoint
    def attend(rows: jax.Array) -> jax.Array:
        scores = jnp.einsum("mqhw,mkhw->mhqk", rows, k, preferred_element_type=jnp.float32)
        seen = valid[:, None, None, :]
        # -1e30 keeps the softmax finite where no candidate is valid; those rows are zeroed.
        weights = jax.nn.softmax(jnp.where(seen, scores / width**0.5, -1e30), axis=-1)
        return jnp.einsum("mhqk,mkhw->mqhw", jnp.where(seen, weights, 0).astype(v.dtype), v)

    out = jax.lax.map(attend, chunks).swapaxes(0, 1)
    return out.reshape(num_queries, -1, heads, width)[:, :num_candidates]
