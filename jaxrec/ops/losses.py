"""Losses over scored targets: full softmax, sampled softmax with log-q correction, gBCE.

All take the outputs at the target positions, the item table (row 0 is padding and never a
candidate) and the target ids, and return the mean over the targets that are not padding.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxrec.typing import PADDING_ID

NEVER = -1e30  # the score of what is no candidate; finite, so that no gradient becomes NaN
MAX_LOGITS = 1 << 22  # logits held at once: 16 MiB, which stays in a CPU's cache


def _mean_over_targets(losses: jax.Array, target_ids: jax.Array) -> jax.Array:
    real = target_ids != PADDING_ID
    return jnp.where(real, losses, 0).sum() / jnp.maximum(real.sum(), 1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def full_softmax_loss(
    hidden: Float[jax.Array, "M D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "M"],
    max_logits: int = MAX_LOGITS,
) -> Float[jax.Array, ""]:
    """Cross-entropy of the target among all items, without ever holding all logits.

        loss[m] = log Σ_v exp(h[m]·e[v]) - h[m]·e[target[m]],   v = 1 … V-1

    Gradients are made in the same pass, chunk by chunk of rows, so nothing is recomputed.

    Cost: 6·M·V·D FLOPs with gradients, 2·M·V·D without; memory max(max_logits, V) logits and
    one f32 copy of the table.
    """
    return _softmax_pass(hidden, table, target_ids, max_logits, with_gradients=False)[0]


def _softmax_pass(
    hidden: jax.Array,
    table: jax.Array,
    target_ids: jax.Array,
    max_logits: int,
    *,
    with_gradients: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss, and its gradients by hidden and table (zeros unless asked for)."""
    num_rows, num_items = hidden.shape[0], table.shape[0]
    chunk = max(1, min(num_rows, max_logits // num_items))
    padding = -num_rows % chunk
    rows = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    ids = jnp.pad(target_ids, (0, padding)).reshape(-1, chunk)
    weights = (ids != PADDING_ID) / jnp.maximum((target_ids != PADDING_ID).sum(), 1)
    is_item = jnp.arange(num_items) != PADDING_ID

    def one_chunk(carry, rows_and_weights):
        loss, dtable = carry
        h, weight = rows_and_weights
        logits = jnp.einsum("md,vd->mv", h, table, preferred_element_type=jnp.float32)
        peak = logits.max(axis=1, keepdims=True)
        exps = jnp.where(is_item, jnp.exp(logits - peak), 0)
        total = exps.sum(axis=1)
        loss += (weight * (jnp.log(total) + peak[:, 0])).sum()
        if not with_gradients:
            return (loss, dtable), jnp.zeros_like(h)
        dlogits = (exps * (weight / total)[:, None]).astype(h.dtype)
        dh = jnp.einsum("mv,vd->md", dlogits, table, preferred_element_type=jnp.float32)
        dtable += jnp.einsum("mv,md->vd", dlogits, h, preferred_element_type=jnp.float32)
        return (loss, dtable), dh

    init = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (loss, dtable), dhidden = jax.lax.scan(one_chunk, init, (rows, weights))
    weight, target_rows = weights.reshape(-1)[:num_rows, None], table[target_ids]
    scores = jnp.einsum("md,md->m", hidden, target_rows, preferred_element_type=jnp.float32)
    loss -= (weight[:, 0] * scores).sum()
    dhidden = dhidden.reshape(-1, hidden.shape[1])[:num_rows] - weight * target_rows
    dtable = dtable.at[target_ids].add(-weight * hidden)
    return loss, dhidden.astype(hidden.dtype), dtable.astype(table.dtype)


def _softmax_forward(hidden, table, target_ids, max_logits):
    loss, dhidden, dtable = _softmax_pass(
        hidden, table, target_ids, max_logits, with_gradients=True
    )
    return loss, (dhidden, dtable)


def _softmax_backward(max_logits, gradients, dloss):
    dhidden, dtable = gradients
    return (dloss * dhidden).astype(dhidden.dtype), (dloss * dtable).astype(dtable.dtype), None


full_softmax_loss.defvjp(_softmax_forward, _softmax_backward)


def _score_candidates(
    hidden: jax.Array, table: jax.Array, target_ids: jax.Array, negative_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """f32 scores of the targets [M] and of their negatives [M, S], shared or one set a target."""
    target = jnp.einsum("md,md->m", hidden, table[target_ids], preferred_element_type=jnp.float32)
    formula = "md,sd->ms" if negative_ids.ndim == 1 else "md,msd->ms"
    negatives = jnp.einsum(formula, hidden, table[negative_ids], preferred_element_type=jnp.float32)
    return target, negatives


def sampled_softmax_loss(
    hidden: Float[jax.Array, "M D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "M"],
    negative_ids: Int[jax.Array, "*negatives"],
    *,
    log_q: Float[jax.Array, "V"] | None = None,
) -> Float[jax.Array, ""]:
    """Cross-entropy of the target among itself and S sampled items.

    Args:
      negative_ids: [S] shared by all targets, or [M, S]. A negative equal to the target is
        dropped.
      log_q: log of the expected number of times that each item is drawn (up to a constant);
        subtracted from every score, so that the expected gradient approaches the full softmax'.
        None stands for uniform draws.

    Cost: 2·M·S·D FLOPs forward. Source: Bengio & Senécal 2008; Yi et al. 2019 (log-q).
    """
    target, negatives = _score_candidates(hidden, table, target_ids, negative_ids)
    if log_q is not None:
        target, negatives = target - log_q[target_ids], negatives - log_q[negative_ids]
    negatives = jnp.where(negative_ids == target_ids[:, None], NEVER, negatives)
    logits = jnp.concatenate([target[:, None], negatives], axis=1)
    loss = jax.nn.logsumexp(logits, axis=1) - target
    return _mean_over_targets(loss, target_ids)


def gbce_loss(
    hidden: Float[jax.Array, "M D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "M"],
    negative_ids: Int[jax.Array, "*negatives"],
    *,
    calibration: float = 0.75,
) -> Float[jax.Array, ""]:
    """Binary cross-entropy with the positive's probability raised to β.

        loss[m] = -β·log σ(s⁺) - Σ_s log(1 - σ(s⁻)),  β = α·(t·(1 - 1/α) + 1/α),  α = S/(V - 2)

    Args:
      calibration: t between 0 (plain BCE) and 1 (probabilities as if all negatives were seen).

    Source: Petrov & Macdonald, gSASRec (RecSys 2023).
    """
    if not 0 <= calibration <= 1:
        raise ValueError(f"calibration must lie between 0 and 1, got {calibration}")
    rate = negative_ids.shape[-1] / (table.shape[0] - 2)
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    target, negatives = _score_candidates(hidden, table, target_ids, negative_ids)
    hit = negative_ids == target_ids[:, None]
    loss = beta * jax.nn.softplus(-target)
    loss += jnp.where(hit, 0, jax.nn.softplus(negatives)).sum(axis=1)
    return _mean_over_targets(loss, target_ids)
