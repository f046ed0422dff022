"""Experts split over the devices of a mesh axis: tokens travel to their experts and back.

Letters: T tokens, D width, H hidden width, E experts, K experts a token, S devices along the axis,
R rows that one device may send to another in one exchange.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxrec.ops.routing import Routing, route
from pallas_kernels import moe_dispatch, moe_ffn


@dataclass(frozen=True)
class ExpertParallel:
    """Where experts are, and how many rows devices exchange.

    Attributes:
      mesh, axis: device i of the S along `axis` has experts i · E / S up to (i + 1) · E / S.
      token_axes: axes over which tokens are split, `axis` among them; None takes all of the mesh's.
        Experts stand whole along the other axes, and their gradients are summed over them.
      capacity_factor: R is capacity_factor · T · K / S for T tokens a device: 1 suffices if every
        device sends equally many to every other. What exceeds R is left out and counted. None
        makes R = T, which always suffices, since a token goes to a device once at most; a device
        then holds rows for the tokens of all S.
    """

    mesh: Mesh
    axis: str
    token_axes: tuple[str, ...] | None = None
    capacity_factor: float | None = None

    def __post_init__(self):
        known = self.mesh.axis_names
        for name in (self.axis, *(self.token_axes or ())):
            if name not in known:
                raise ValueError(f"the mesh has no axis {name!r}; it has {', '.join(known)}")
        if self.token_axes is not None and self.axis not in self.token_axes:
            raise ValueError(
                f"token_axes is {self.token_axes}; expected the experts' axis {self.axis!r} in it"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor}; expected above 0, or None for room "
                "that always suffices"
            )

    @property
    def num_shards(self) -> int:
        """S."""
        return self.mesh.shape[self.axis]

    @property
    def token_spec(self) -> PartitionSpec:
        """How arrays with tokens along their first axis are split."""
        return PartitionSpec(self.token_axes or self.mesh.axis_names)

    @property
    def num_parts(self) -> int:
        """Parts that tokens are split into."""
        axes = self.token_axes or self.mesh.axis_names
        return math.prod(self.mesh.shape[name] for name in axes)

    def missing_tokens(self, num_tokens: int) -> int:
        """How many tokens a number lacks to be split into equal parts."""
        return -num_tokens % self.num_parts

    def check_experts(self, num_experts: int, owner: str = "the layer") -> None:
        """Raises ValueError unless the axis divides the experts of `owner`."""
        if num_experts % self.num_shards:
            raise ValueError(
                f"{owner} has {num_experts} experts, which the {self.num_shards} devices of mesh "
                f"axis {self.axis!r} cannot share equally; choose a multiple of {self.num_shards} "
                "experts, or a smaller axis"
            )

    def capacity(self, num_tokens: int, slots: int) -> int:
        """R for so many tokens a device."""
        if self.capacity_factor is None:
            return num_tokens
        rows = self.capacity_factor * num_tokens * slots / self.num_shards
        return min(num_tokens, max(1, math.ceil(rows)))


class Exchanged(NamedTuple):
    """What `expert_parallel_ffn` gives.

    Attributes:
      out: the tokens' outputs.
      lost: (token, expert) pairs that found no room in the exchange, 0 if all is well; i32.
      beside: what was given as such.
    """

    out: Float[Array, "T D"]
    lost: Int32[Array, ""]
    beside: Float[Array, "T W"] | None = None


def split_route(
    logits: Float[Array, "T E"],
    parallel: ExpertParallel,
    *,
    bias: Float[Array, "E"] | None = None,
    valid: Bool[Array, "T"] | None = None,
    **options: Any,
) -> Routing:
    """`route` of all tokens, each chosen for on its own device; in a global view.

    (Left to itself the compiler gathers all scores on every device, for the sake of top-k.)

    Args:
      logits, bias, valid, options: see `route`.
    """
    num_tokens, missing = logits.shape[0], parallel.missing_tokens(logits.shape[0])
    tokens, whole = parallel.token_spec, PartitionSpec()
    routing = jax.shard_map(
        lambda logits, bias, valid: route(logits, bias=bias, valid=valid, **options),
        mesh=parallel.mesh,
        in_specs=(tokens, whole, tokens),
        out_specs=tokens,
        check_vma=False,
    )(
        jnp.pad(logits, ((0, missing), (0, 0))),
        bias,
        None if valid is None else jnp.pad(valid, (0, missing)),
    )
    return Routing(*(part[:num_tokens] for part in routing))


def split_ffn(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    weights: dict[str, Array | None],
    parallel: ExpertParallel,
    *,
    beside: Float[Array, "T W"] | None = None,
    **options: Any,
) -> Exchanged:
    """`moe_ffn` of all tokens, with experts and tokens split over a mesh; in a global view.

    Equals `moe_ffn` of the same arrays, gradients included, up to the order of sums, unless
    `lost` tells that the room did not suffice.

    Args:
      x, expert_ids, gates: of all devices; T may be any number, as it is padded to equal parts.
      weights: w_gate, w_up, w_down, b_gate, b_up and b_down of all E experts.
      beside: see `expert_parallel_ffn`.
      options: activation, save, chunk_tokens, … of `moe_ffn`.

    Raises:
      ValueError: E does not divide over the axis, or what `moe_ffn` raises.

    Cost: see `expert_parallel_ffn`.
    """
    w_up = weights["w_up"]
    assert w_up is not None
    parallel.check_experts(w_up.shape[0])
    num_tokens, missing = x.shape[0], parallel.missing_tokens(x.shape[0])
    room = ((0, missing), (0, 0))
    own_tokens = (num_tokens + missing) // parallel.num_parts
    capacity = parallel.capacity(own_tokens, expert_ids.shape[1])
    tokens, experts = parallel.token_spec, PartitionSpec(parallel.axis)

    def local(x, ids, gates, beside, weights):
        found = expert_parallel_ffn(
            x, ids, gates, weights,
            axis=parallel.axis, capacity=capacity, beside=beside, **options,
        )  # fmt: skip
        return found._replace(lost=found.lost[None])

    out, lost, beside = jax.shard_map(
        local,
        mesh=parallel.mesh,
        in_specs=(tokens, tokens, tokens, tokens, experts),
        out_specs=tokens,
        check_vma=False,  # kernels do not say what they vary over
    )(
        jnp.pad(x, room),
        jnp.pad(jnp.asarray(expert_ids, jnp.int32), room, constant_values=-1),
        jnp.pad(gates, room),
        None if beside is None else jnp.pad(beside, room),
        weights,
    )
    return Exchanged(out[:num_tokens], lost.sum(), None if beside is None else beside[:num_tokens])


def expert_parallel_ffn(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    weights: dict[str, Array | None],
    *,
    axis: str,
    capacity: int | None = None,
    beside: Float[Array, "T W"] | None = None,
    **options: Any,
) -> Exchanged:
    """`moe_ffn` of a device's own tokens, with experts split over `axis`; inside `shard_map`.

    A token's row goes once to each device that has experts of it, and comes back as the sum of
    what they gave: experts that share a device share the journey. Rows stand in fixed places, R
    for every pair of devices, so shapes are static and no device waits for counts.

    Args:
      x, expert_ids, gates: of this device's tokens; ids count all experts, and an id outside
        0 … E - 1 goes nowhere.
      weights: w_gate, w_up, w_down and biases of this device's E / S experts, or None.
      axis: a manual mesh axis.
      capacity: R; None takes T, which always suffices. Where it does not, the tokens behind the
        first R do without this device's experts, and `lost` counts their pairs: then raise it.
      beside: an array that is computed meanwhile, such as the hidden layer of a shared expert, and
        returned. The experts wait for it, and what is returned waits for the experts: so of two
        products the first runs beside the journey there and the second beside the one back, where
        the scheduler would put both beside the last. Their gradients are parted the same way.
      options: activation, save, chunk_tokens, … of `moe_ffn`. It keeps S · R rows for the
        gradient, with up to min(K, E / S) experts each.

    Returns:
      the outputs, and how many of this device's pairs are lost.

    Raises:
      ValueError: K > E, capacity < 1, or what `moe_ffn` raises.

    Gradient: of x, gates and weights; deterministic.
    Cost: forward two all-to-alls of S · R · D elements and one of 8 · S · R · min(K, E / S) bytes,
    and the same backward, of which 1 / S stays on the device.
    """
    (num_tokens, slots), num_shards = expert_ids.shape, lax.axis_size(axis)
    w_up = weights["w_up"]
    assert w_up is not None
    own_experts = w_up.shape[0]
    if slots > own_experts * num_shards:
        raise ValueError(f"{slots} experts a token, but only {own_experts * num_shards} exist")
    if num_tokens == 0:
        return Exchanged(jnp.zeros_like(x), jnp.zeros((), jnp.int32), beside)
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity is {capacity}; expected at least 1")
    plan = _plan(expert_ids, own_experts, num_shards, capacity or num_tokens)
    exchange = partial(lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
    ids, own_gates = _local_pairs(expert_ids, gates, plan, own_experts, num_shards)
    # Ids travel with the gates; f32 holds them exactly.
    labels = exchange(jnp.concatenate([ids.astype(jnp.float32), own_gates], axis=1))
    ids, own_gates = jnp.split(labels, 2, axis=1)
    rows = exchange(_to_rows(x, plan))
    rows, beside = _together(rows, beside)
    arguments: Any = weights | options
    rows = moe_ffn(rows, ids.astype(jnp.int32), own_gates, **arguments)
    rows, beside = _together(rows, beside)
    return Exchanged(_from_rows(exchange(rows), plan).astype(x.dtype), plan.lost, beside)


def _together(rows: Array, beside: Array | None) -> tuple[Array, Array | None]:
    """Both as they are, each of them when both are there; so with their gradients."""
    return (rows, None) if beside is None else lax.optimization_barrier((rows, beside))


class _Plan(NamedTuple):
    """Which token each row carries; P = S · R.

    Attributes:
      tokens: token of each row, T where there is none; i32[P].
      rows: rows of each token, -1 where it has no further one; i32[T, K].
      lost: pairs without room.
    """

    tokens: Int32[Array, "P"]
    rows: Int32[Array, "T K"]
    lost: Int32[Array, ""]


def _plan(expert_ids: Array, own_experts: int, num_shards: int, capacity: int) -> _Plan:
    num_tokens, slots = expert_ids.shape
    routed = (expert_ids >= 0) & (expert_ids < own_experts * num_shards)
    shard = jnp.where(routed, expert_ids // own_experts, -1)
    same = shard[:, :, None] == shard[:, None, :]
    again = jnp.any(same & jnp.tril(jnp.ones((slots, slots), bool), -1), axis=2)
    goal = jnp.where(again, -1, shard).reshape(-1, 1)
    dispatch = moe_dispatch(goal, num_experts=num_shards)
    starts, ends = dispatch.expert_token_offsets[:-1], dispatch.expert_token_offsets[1:]
    places = jnp.arange(capacity) + starts[:, None]
    last = goal.size - 1
    pairs = dispatch.expert_token_indices[jnp.minimum(places, last)]
    tokens = jnp.where(places < ends[:, None], pairs // slots, num_tokens)
    rank = dispatch.token_index_map - starts[jnp.maximum(goal, 0)]
    fits = (goal >= 0) & (rank < capacity)
    rows = jnp.where(fits, goal * capacity + rank, -1).reshape(num_tokens, slots)
    # A pair is on its way if its token has a row to the pair's device.
    arrives = jnp.any(same & (rows >= 0)[:, None, :], axis=2)
    lost = jnp.sum(routed & ~arrives, dtype=jnp.int32)
    return _Plan(tokens.reshape(-1).astype(jnp.int32), rows, lost)


def _local_pairs(
    expert_ids: Array, gates: Array, plan: _Plan, own_experts: int, num_shards: int
) -> tuple[Array, Array]:
    """(expert ids as their owner counts them, gates) of each row, [P, min(K, E / S)]."""
    num_rows = plan.tokens.size
    first = jnp.arange(num_rows, dtype=jnp.int32) // (num_rows // num_shards) * own_experts
    taken = expert_ids.at[plan.tokens].get(mode="fill", fill_value=-1) - first[:, None]
    gates = _to_rows(gates.astype(jnp.float32), plan)
    here = (taken >= 0) & (taken < own_experts)
    if expert_ids.shape[1] <= own_experts:
        return jnp.where(here, taken, -1), jnp.where(here, gates, 0)
    # Fewer experts here than slots: a column for each expert.
    experts = jnp.arange(own_experts)
    named = (taken[:, :, None] == experts) & here[:, :, None]
    ids = jnp.where(named.any(axis=1), experts, -1)
    return ids, jnp.sum(jnp.where(named, gates[:, :, None], 0), axis=1)


@jax.custom_vjp
def _to_rows(values: Array, plan: _Plan) -> Array:
    """Each row its token's values, zeros where there is none; [P, …].

    With `_from_rows` each is the other's transpose: both directions gather, so none is a scatter
    with atomics.
    """
    return values.at[plan.tokens].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _from_rows(rows: Array, plan: _Plan) -> Float[Array, "T D"]:
    """Each token the sum of its rows, in f32."""
    taken = rows.at[jnp.maximum(plan.rows, 0)].get(mode="promise_in_bounds").astype(jnp.float32)
    return jnp.sum(jnp.where(plan.rows[..., None] >= 0, taken, 0), axis=1)


_to_rows.defvjp(
    lambda values, plan: (_to_rows(values, plan), (plan, values[:0])),
    lambda kept, d_rows: (_from_rows(d_rows, kept[0]).astype(kept[1].dtype), None),
)
_from_rows.defvjp(
    lambda rows, plan: (_from_rows(rows, plan), (plan, rows[:0])),
    lambda kept, d_out: (_to_rows(d_out.astype(kept[1].dtype), kept[0]), None),
)
