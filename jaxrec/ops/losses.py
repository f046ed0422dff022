"""Losses over scored targets: full softmax, sampled softmax with log-q correction, gBCE.

All take the outputs at the target positions, the item table (row 0 is padding and never a
candidate) and the target ids, and return the mean over the targets that are not padding.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from jaxrec.ops.full_softmax import NEVER as NEVER
from jaxrec.ops.full_softmax import full_softmax_loss as full_softmax_loss
from jaxrec.ops.full_softmax import in_chunks
from jaxrec.typing import PADDING_ID

MAX_GATHERED = 1 << 22  # elements of negatives' rows held at once


def _mean_over_targets(losses: jax.Array, target_ids: jax.Array) -> jax.Array:
    real = target_ids != PADDING_ID
    return jnp.where(real, losses, 0).sum() / jnp.maximum(real.sum(), 1)


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
    target = gathered_scores(hidden, table, target_ids[:, None])[:, 0]
    if negative_ids.ndim == 1:
        rows = table[negative_ids].astype(hidden.dtype)
        negatives = jnp.einsum("md,sd->ms", hidden, rows, preferred_element_type=jnp.float32)
    else:
        negatives = gathered_scores(hidden, table, negative_ids)
    return target, jnp.where(usable_negatives(target_ids, negative_ids), negatives, NEVER)


@jax.custom_vjp
def gathered_scores(
    hidden: Float[jax.Array, "M D"], table: Float[jax.Array, "V D"], ids: Int[jax.Array, "M S"]
) -> Float[jax.Array, "M S"]:
    """h[m] · e[ids[m, s]] in f32, the table's rows gathered for some m at a time.

    Products are computed in the dtype of hidden. The gradient gathers the rows again.

    Cost: 2·M·S·D FLOPs, three times that with gradients; memory `MAX_GATHERED` elements.
    """
    split = _gather_chunks(hidden, ids)

    def one_chunk(h_and_ids):
        h, ids = h_and_ids
        rows = table[ids].astype(h.dtype)
        return jnp.einsum("md,msd->ms", h, rows, preferred_element_type=jnp.float32)

    scores = lax.map(one_chunk, (split(hidden), split(ids)))
    return scores.reshape(-1, ids.shape[1])[: ids.shape[0]]


def _gather_chunks(hidden, ids):
    """A function that cuts rows into chunks of which each gathers `MAX_GATHERED` elements."""
    num_rows, (width, slots) = ids.shape[0], (hidden.shape[1], ids.shape[1])
    num_chunks = max(1, -(-num_rows * width * slots // MAX_GATHERED))
    size = -(-num_rows // num_chunks)

    return lambda x: in_chunks(x, num_chunks, size)


def _gathered_forward(hidden, table, ids):
    return gathered_scores(hidden, table, ids), (hidden, table, ids)


def _gathered_backward(kept, dscores):
    hidden, table, ids = kept
    split = _gather_chunks(hidden, ids)

    def one_chunk(dtable, chunk):
        h, ids, d = chunk
        rows = table[ids].astype(h.dtype)
        dh = jnp.einsum("ms,msd->md", d, rows, preferred_element_type=jnp.float32)
        drows = d[:, :, None] * h.astype(jnp.float32)[:, None, :]
        return dtable.at[ids].add(drows), dh

    init = jnp.zeros(table.shape, jnp.float32)
    dtable, dhidden = lax.scan(one_chunk, init, (split(hidden), split(ids), split(dscores)))
    dhidden = dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return dhidden.astype(hidden.dtype), dtable.astype(table.dtype), None


gathered_scores.defvjp(_gathered_forward, _gathered_backward)


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

    Cost: 2·M·S·D FLOPs forward, three times that with gradients; memory M·S logits and S rows, or
    `MAX_GATHERED` elements of rows for [M, S] negatives. Source: Bengio & Senécal 2008 (importance
    sampling).
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
    num_items: int | None = None,
) -> Float[jax.Array, ""]:
    """Binary cross-entropy with the positive's probability raised to β.

        loss[m] = -β·log σ(s⁺) - Σ_s log(1 - σ(s⁻)),  β = α·(t·(1 - 1/α) + 1/α),  α = S/(V - 2)

    Args:
      negative_ids: [S] shared by all targets, or [M, S], drawn uniformly. Negatives equal to the
        target, and padding, are dropped.
      calibration: t between 0 (plain BCE) and 1 (probabilities as if all negatives were seen).
      num_items: V - 1 where the table holds only some of the items' rows; None means its own.

    Raises:
      ValueError: negative_ids is neither [S] nor [M, S] or has no draws; calibration outside
        0 … 1; a table of fewer than two items.

    Cost: as `sampled_softmax_loss`.
    Source: Petrov & Macdonald, gSASRec (RecSys 2023).
    """
    if not 0 <= calibration <= 1:
        raise ValueError(f"calibration must lie between 0 and 1, got {calibration}")
    _check_negatives(negative_ids, target_ids)
    num_items = table.shape[0] - 1 if num_items is None else num_items
    if num_items < 2 or negative_ids.shape[-1] == 0:
        raise ValueError(
            f"gbce_loss needs two items and one negative at least, got {num_items} items (row 0 of "
            f"the table is padding) and negatives {negative_ids.shape}"
        )
    rate = negative_ids.shape[-1] / (num_items - 1)
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    target, negatives = _score_candidates(hidden, table, target_ids, negative_ids)
    loss = beta * jax.nn.softplus(-target) + jax.nn.softplus(negatives).sum(axis=1)
    return _mean_over_targets(loss, target_ids)
