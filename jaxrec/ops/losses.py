"""Losses over scored targets: full softmax, sampled softmax with log-q correction, gBCE.

All take the outputs at the target positions, the item table (row 0 is padding and never a
candidate) and the target ids, and return the mean over the targets that are not padding.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

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

    Args:
      hidden, table: of one dtype, bf16 or f32; logits and sums are f32.
      max_logits: logits held at once (static); rows are taken in equal chunks of that many.

    Cost: 6·M·V·D FLOPs with gradients, 2·M·V·D without; memory max(max_logits, V) logits and
    one f32 copy of the table. Differentiable once, in reverse.
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
    (num_rows, width), num_items = hidden.shape, table.shape[0]
    num_chunks = max(1, -(-num_rows // max(1, max_logits // num_items)))
    chunk = -(-num_rows // num_chunks)
    padding = num_chunks * chunk - num_rows
    rows = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(num_chunks, chunk, width)
    real = target_ids != PADDING_ID
    weight = (real / jnp.maximum(real.sum(), 1)).astype(jnp.float32)
    weights = jnp.pad(weight, (0, padding)).reshape(num_chunks, chunk)
    is_item = jnp.arange(num_items) != PADDING_ID

    def one_chunk(carry, rows_and_weights):
        loss, dtable = carry
        h, weight = rows_and_weights
        logits = jnp.einsum("md,vd->mv", h, table, preferred_element_type=jnp.float32)
        logits = jnp.where(is_item, logits, NEVER)
        peak = logits.max(axis=1)
        exps = jnp.exp(logits - peak[:, None])
        total = exps.sum(axis=1)
        loss += (weight * (jnp.log(total) + peak)).sum()
        if not with_gradients:
            return (loss, dtable), jnp.zeros_like(h, jnp.float32)
        # The row factor goes to the small operands: one pass less over all logits.
        factor, exps = (weight / total)[:, None], exps.astype(h.dtype)
        dh = jnp.einsum("mv,vd->md", exps, table, preferred_element_type=jnp.float32) * factor
        scaled = (h * factor).astype(h.dtype)
        dtable += jnp.einsum("mv,md->vd", exps, scaled, preferred_element_type=jnp.float32)
        return (loss, dtable), dh

    init = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (loss, dtable), dhidden = jax.lax.scan(one_chunk, init, (rows, weights))
    target_rows = table[target_ids]
    scores = jnp.einsum("md,md->m", hidden, target_rows, preferred_element_type=jnp.float32)
    loss -= (weight * scores).sum()
    dhidden = dhidden.reshape(-1, width)[:num_rows] - weight[:, None] * target_rows
    dtable = dtable.at[target_ids].add(-weight[:, None] * hidden)
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


def _check_negatives(negative_ids: jax.Array, target_ids: jax.Array) -> None:
    shape, num_targets = negative_ids.shape, target_ids.shape[0]
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != num_targets):
        raise ValueError(
            f"negative_ids has shape {shape}; expected [S], shared by all targets, "
            f"or [M, S] with M = {num_targets} targets"
        )


def _score_candidates(
    hidden: jax.Array, table: jax.Array, target_ids: jax.Array, negative_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """f32 scores of the targets [M] and of their negatives [M, S], shared or one set a target.

    Negatives that are the target itself or padding score `NEVER`.
    """
    target = jnp.einsum("md,md->m", hidden, table[target_ids], preferred_element_type=jnp.float32)
    formula = "md,sd->ms" if negative_ids.ndim == 1 else "md,msd->ms"
    negatives = jnp.einsum(formula, hidden, table[negative_ids], preferred_element_type=jnp.float32)
    return target, jnp.where(usable_negatives(target_ids, negative_ids), negatives, NEVER)


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
      negative_ids: [S] shared by all targets, or [M, S], drawn with replacement. Negatives equal
        to the target, and padding, are dropped.
      log_q: log of the probability that one draw gives each item (as the samplers of
        `jaxrec.data` state it; finite, also for padding). A negative's score is then lowered by
        log(S·q), the log of how often it is expected among the S draws, so that the loss and its
        gradient approach the full softmax' as S grows. The target is there exactly once, so its
        score stays. None leaves all scores as they are: a softmax among the target and the draws.

    Raises:
      ValueError: negative_ids is neither [S] nor [M, S].

    Cost: 2·M·S·D FLOPs forward, three times that with gradients; memory M·S logits, and M·S·D
    for the rows of [M, S] negatives. Source: Bengio & Senécal 2008 (importance sampling).
    """
    _check_negatives(negative_ids, target_ids)
    target, negatives = _score_candidates(hidden, table, target_ids, negative_ids)
    return _sampled_softmax(target, negatives, target_ids, negative_ids, log_q)


def scored_softmax_loss(
    target_scores: Float[jax.Array, "M"],
    negative_scores: Float[jax.Array, "M S"],
    target_ids: Int[jax.Array, "M"],
    negative_ids: Int[jax.Array, "*negatives"],
    *,
    log_q: Float[jax.Array, "V"] | None = None,
) -> Float[jax.Array, ""]:
    """`sampled_softmax_loss` for scores of any similarity, such as an over-arch.

    Args:
      target_scores, negative_scores: f32 scores of `target_ids` and `negative_ids`.
      negative_ids, log_q: as there.

    Raises:
      ValueError: negative_ids is neither [S] nor [M, S].
    """
    _check_negatives(negative_ids, target_ids)
    negative_scores = jnp.where(usable_negatives(target_ids, negative_ids), negative_scores, NEVER)
    return _sampled_softmax(target_scores, negative_scores, target_ids, negative_ids, log_q)


def _sampled_softmax(target, negatives, target_ids, negative_ids, log_q) -> jax.Array:
    if log_q is not None:
        negatives -= log_q[negative_ids] + math.log(max(1, negative_ids.shape[-1]))
    logits = jnp.concatenate([target[:, None], negatives], axis=1)
    loss = jax.nn.logsumexp(logits, axis=1) - target
    return _mean_over_targets(loss, target_ids)


def usable_negatives(
    target_ids: Int[jax.Array, "M"], negative_ids: Int[jax.Array, "*negatives"]
) -> Bool[jax.Array, "M S"]:
    """Negatives that are neither their target nor padding."""
    return (negative_ids != target_ids[:, None]) & (negative_ids != PADDING_ID)


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
      negative_ids: [S] shared by all targets, or [M, S], drawn uniformly. Negatives equal to the
        target, and padding, are dropped.
      calibration: t between 0 (plain BCE) and 1 (probabilities as if all negatives were seen).

    Raises:
      ValueError: negative_ids is neither [S] nor [M, S] or has no draws; calibration outside
        0 … 1; a table of fewer than two items.

    Cost: as `sampled_softmax_loss`.
    Source: Petrov & Macdonald, gSASRec (RecSys 2023).
    """
    if not 0 <= calibration <= 1:
        raise ValueError(f"calibration must lie between 0 and 1, got {calibration}")
    _check_negatives(negative_ids, target_ids)
    if table.shape[0] < 3 or negative_ids.shape[-1] == 0:
        raise ValueError(
            f"gbce_loss needs two items and one negative at least, got a table of "
            f"{table.shape[0]} rows (row 0 is padding) and negatives {negative_ids.shape}"
        )
    rate = negative_ids.shape[-1] / (table.shape[0] - 2)
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    target, negatives = _score_candidates(hidden, table, target_ids, negative_ids)
    loss = beta * jax.nn.softplus(-target) + jax.nn.softplus(negatives).sum(axis=1)
    return _mean_over_targets(loss, target_ids)
