"""Routing tokens to experts: gates, the losses that balance the experts, and what to watch.

Letters: T tokens, E experts, K experts a token. Everything is f32. Tokens with `valid` False
(padding) have expert ids -1 and gates 0, and count nowhere.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels import moe_dispatch

type Scoring = Literal["softmax", "sigmoid"]
type Normalise = Literal["all", "selected"]

_TINY = 1e-20


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
      expert_ids: best expert first; -1 for padding; i32[T, K].
      gates: weights of these experts; f32[T, K].
      probabilities: every expert's score as a share of the token's total; zeros for padding;
        f32[T, E].
    """

    expert_ids: Int32[Array, "T K"]
    gates: Float32[Array, "T K"]
    probabilities: Float32[Array, "T E"]


class RouterStats(NamedTuple):
    """How evenly experts are used.

    Attributes:
      load: pairs of each expert; i32[E].
      max_over_mean: largest load over the mean load: what the slowest expert costs; f32.
      dead_experts: experts without any token; i32.
      entropy: of a token's probabilities, mean in nats; ln(E) where all are alike; f32.
      dropped: pairs over an expert's capacity, or over that of the exchange between devices where
        experts are split; 0 without such limits; i32.
      nonfinite: tokens whose logits are not all finite: a broken layer, see
        `jaxrec.nn.check_routers`; i32.
    """

    load: Int32[Array, "E"]
    max_over_mean: Float32[Array, ""]
    dead_experts: Int32[Array, ""]
    entropy: Float32[Array, ""]
    dropped: Int32[Array, ""]
    nonfinite: Int32[Array, ""]


def route(
    logits: Float[Array, "T E"],
    *,
    slots: int,
    scoring: Scoring = "softmax",
    normalise: Normalise = "selected",
    bias: Float[Array, "E"] | None = None,
    groups: int = 1,
    top_groups: int = 1,
    valid: Bool[Array, "T"] | None = None,
) -> Routing:
    """Each token's K = `slots` best experts.

    Args:
      logits: of the router; used in f32.
      scoring: a softmax over the experts, or a sigmoid of each.
      normalise: gates are the scores themselves ("all": normalised over all experts, if at all) or
        scores that are divided by the sum of the K selected ("selected").
      bias: added to the scores for the choice alone, not to the gates; see `updated_bias`.
      groups, top_groups: experts in so many equal groups, of which a token may use the best
        `top_groups` (by the sum of their two best scores), to bound the devices it visits.
      valid: False for padding.

    Raises:
      ValueError: slots, groups or top_groups do not fit E.

    Source: Shazeer et al. 2017; Mixtral 2024 ("selected"); DeepSeek-V3 2024 (sigmoid, bias,
    groups).
    """
    num_experts = logits.shape[1]
    _check(num_experts, slots, scoring, normalise, groups, top_groups)
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits) if scoring == "softmax" else jax.nn.sigmoid(logits)
    ranking = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if top_groups < groups:
        ranking = _best_groups(ranking, groups, top_groups)
    ids = jax.lax.top_k(ranking, slots)[1].astype(jnp.int32)
    gates = jnp.take_along_axis(scores, ids, axis=1)
    if normalise == "selected":
        gates = gates / jnp.maximum(gates.sum(axis=1, keepdims=True), _TINY)
    shares = scores / jnp.maximum(scores.sum(axis=1, keepdims=True), _TINY)
    if valid is not None:
        kept = valid[:, None]
        ids, gates = jnp.where(kept, ids, -1), jnp.where(kept, gates, 0)
        shares = jnp.where(kept, shares, 0)
    return Routing(ids, gates, shares)


def noisy(
    logits: Float[Array, "T E"], spread: Float[Array, "T E"], key: jax.Array
) -> Float32[Array, "T E"]:
    """logits + softplus(spread) · a normal draw: exploration that the router learns to reduce.

    Source: Shazeer et al. 2017.
    """
    noise = jax.random.normal(key, logits.shape)
    return logits.astype(jnp.float32) + jax.nn.softplus(spread.astype(jnp.float32)) * noise


def within_capacity(
    expert_ids: Int[Array, "T K"], gates: Float[Array, "T K"], *, num_experts: int, capacity: int
) -> tuple[Int32[Array, "T K"], Float[Array, "T K"], Int32[Array, ""]]:
    """(ids, gates, dropped): pairs behind an expert's first `capacity` ones are routed nowhere.

    Pairs are counted slot by slot, tokens in order: every token's best expert comes first.
    """
    by_slot = expert_ids.T.reshape(-1, 1)
    dispatch = moe_dispatch(by_slot, num_experts=num_experts)
    first = dispatch.expert_token_offsets[jnp.maximum(by_slot, 0)]
    rank = (dispatch.token_index_map - first).reshape(expert_ids.shape[::-1]).T
    kept = (expert_ids >= 0) & (rank < capacity)
    dropped = jnp.sum((expert_ids >= 0) & ~kept, dtype=jnp.int32)
    return jnp.where(kept, expert_ids, -1), jnp.where(kept, gates, 0), dropped


def expert_load(expert_ids: Int[Array, "T K"], num_experts: int) -> Int32[Array, "E"]:
    """Pairs that each expert gets."""
    flat = jnp.where(expert_ids >= 0, expert_ids, num_experts).reshape(-1)
    return jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")


def load_balancing_loss(routing: Routing) -> Float32[Array, ""]:
    """E · Σ_e (share of the pairs that e gets) · (e's mean probability); 1 if all are even.

    Source: Switch Transformers (Fedus et al. 2021). The gradient flows through probabilities.
    """
    num_experts = routing.probabilities.shape[1]
    load = expert_load(routing.expert_ids, num_experts).astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(routing.expert_ids[:, 0] >= 0), 1)
    shares = load / jnp.maximum(load.sum(), 1)
    return num_experts * jnp.sum(shares * routing.probabilities.sum(axis=0) / tokens)


def sequence_balancing_loss(
    routing: Routing, segment_ids: Int[Array, "T"], num_sequences: int
) -> Float32[Array, ""]:
    """`load_balancing_loss` of each sequence, averaged over the sequences that have tokens.

    Args:
      segment_ids: the sequence of each token; num_sequences for slots of none.

    Source: DeepSeek-V3 (2024), where it complements bias-based balancing.
    """
    num_experts = routing.probabilities.shape[1]
    size = num_sequences + 1
    chosen = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=jnp.float32).sum(axis=1)
    load = jax.ops.segment_sum(chosen, segment_ids, size)[:-1]
    probabilities = jax.ops.segment_sum(routing.probabilities, segment_ids, size)[:-1]
    valid = (routing.expert_ids[:, 0] >= 0).astype(jnp.float32)
    tokens = jax.ops.segment_sum(valid, segment_ids, size)[:-1]
    shares = load / jnp.maximum(load.sum(axis=1, keepdims=True), 1)
    losses = num_experts * jnp.sum(shares * probabilities, axis=1) / jnp.maximum(tokens, 1)
    return losses.sum() / jnp.maximum((tokens > 0).sum(), 1)


def cv_squared(values: Float[Array, "E"]) -> Float32[Array, ""]:
    """(standard deviation / mean)²: 0 for equal values; of importance or load, a balancing loss.

    Importance is `importance(routing)`. Source: Shazeer et al. 2017.
    """
    values = values.astype(jnp.float32)
    return values.var() / jnp.maximum(values.mean() ** 2, _TINY)


def importance(routing: Routing) -> Float32[Array, "E"]:
    """Sum of each expert's gates over the tokens."""
    num_experts = routing.probabilities.shape[1]
    flat = jnp.where(routing.expert_ids >= 0, routing.expert_ids, num_experts).reshape(-1)
    total = jnp.zeros(num_experts, jnp.float32)
    return total.at[flat].add(routing.gates.reshape(-1), mode="drop")


def router_z_loss(
    logits: Float[Array, "T E"], valid: Bool[Array, "T"] | None = None
) -> Float32[Array, ""]:
    """Mean of logsumexp(logits)² over tokens: keeps logits small, and so f32 softmax exact.

    Source: ST-MoE (Zoph et al. 2022).
    """
    squares = jax.nn.logsumexp(logits.astype(jnp.float32), axis=1) ** 2
    if valid is None:
        return squares.sum() / max(squares.size, 1)
    return jnp.where(valid, squares, 0).sum() / jnp.maximum(valid.sum(), 1)


def updated_bias(
    bias: Float[Array, "E"], load: Int[Array, "E"], *, rate: float = 1e-3
) -> Float32[Array, "E"]:
    """bias + rate · sign(mean load - load): overloaded experts are chosen less from now on.

    Source: auxiliary-loss-free balancing (Wang et al. 2024).
    """
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(load.mean() - load)


def router_stats(
    routing: Routing,
    dropped: Int[Array, ""] | int = 0,
    *,
    logits: Float[Array, "T E"] | None = None,
) -> RouterStats:
    """How evenly this routing uses the experts; `nonfinite` is counted where logits are given."""
    shares, nonfinite = routing.probabilities, 0
    if logits is not None:
        broken = (routing.expert_ids[:, 0] >= 0) & ~jnp.isfinite(logits).all(axis=1)
        nonfinite = jnp.sum(broken, dtype=jnp.int32)
    load = expert_load(routing.expert_ids, shares.shape[1])
    tokens = jnp.maximum(jnp.sum(shares.sum(axis=1) > 0), 1)
    entropy = -jnp.sum(shares * jnp.log(jnp.maximum(shares, _TINY))) / tokens
    return RouterStats(
        load=load,
        max_over_mean=load.max() / jnp.maximum(load.mean(), _TINY),
        dead_experts=jnp.sum(load == 0, dtype=jnp.int32),
        entropy=entropy,
        dropped=jnp.asarray(dropped, jnp.int32),
        nonfinite=jnp.asarray(nonfinite, jnp.int32),
    )


def _best_groups(ranking: jax.Array, groups: int, top_groups: int) -> jax.Array:
    """The ranking with the experts of all but each token's best groups at -inf."""
    grouped = ranking.reshape(ranking.shape[0], groups, -1)
    best_two = jax.lax.top_k(grouped, min(2, grouped.shape[2]))[0].sum(axis=-1)
    chosen = jax.lax.top_k(best_two, top_groups)[1]
    kept = jax.nn.one_hot(chosen, groups, dtype=bool).any(axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(ranking.shape)


def _check(num_experts, slots, scoring, normalise, groups, top_groups) -> None:
    if scoring not in ("softmax", "sigmoid") or normalise not in ("all", "selected"):
        raise ValueError(
            f"scoring is {scoring!r} and normalise {normalise!r}; expected 'softmax' or 'sigmoid', "
            "'all' or 'selected'"
        )
    if groups < 1 or num_experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(
            f"{num_experts} experts in {groups} groups, of which {top_groups} are used; expected "
            "equal groups, and 1 to all of them used"
        )
    most = num_experts // groups * top_groups
    if not 1 <= slots <= most:
        raise ValueError(f"slots is {slots}; expected 1 to {most}, the experts a token may use")
