"""Which token goes to which expert, regrouped by expert: built without sort and without atomics.

Letters: T tokens, K experts a token, E experts, N = T·K pairs.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Int, Int32

from pallas_kernels._backend import Backend, resolve

SORT_FREE_EXPERTS = 256
"""Most experts for which ranks are counted; beyond, sorting costs less than a row of counters."""

_BLOCK = 64

type Method = Literal["count", "sort"]


class Dispatch(NamedTuple):
    """Pairs (token, expert) in the order of experts, and the way there and back.

    Within an expert pairs keep the order of the tokens. Pairs whose expert id is outside 0 … E - 1
    are routed nowhere: they have index -1, and `expert_token_indices` ends with as many -1.

    Attributes:
      expert_token_indices: the token of each pair, grouped by expert; i32[N].
      expert_token_offsets: expert e owns the pairs offsets[e] up to offsets[e + 1]; i32[E + 1].
      token_expert_indices: expert ids in token order; i32[N].
      token_index_map: where each (token, slot) stands in `expert_token_indices`; i32[T, K].
    """

    expert_token_indices: Int32[jax.Array, "N"]
    expert_token_offsets: Int32[jax.Array, "E1"]
    token_expert_indices: Int32[jax.Array, "N"]
    token_index_map: Int32[jax.Array, "T K"]


def moe_dispatch(
    expert_ids: Int[jax.Array | np.ndarray, "T K"],
    *,
    num_experts: int,
    method: Method | None = None,
    backend: Backend | None = None,
    checked: bool = False,
) -> Dispatch:
    """Groups the (token, slot) pairs by expert; deterministic, all on the device.

    Args:
      expert_ids: the K experts of each token. An id outside 0 … E - 1 is routed nowhere, which
        suits padding. An expert named twice gets the token twice.
      num_experts: E.
      method: of the XLA backend: "count" ranks pairs by counting in blocks, "sort" sorts them,
        stably. None sorts on a CPU and for more than 256 experts, and counts otherwise.
      backend: "xla"; "mosaic_gpu" counts on Hopper's tensor cores, up to 256 experts; or None for
        the better supported (XLA's, if a method is named). The result is the same.
      checked: raises for ids that are out of range; needs concrete ids, so cannot be traced.

    Raises:
      ValueError: E < 1, K > E, an unknown method, or (checked) an id that is no expert.
      BackendError: the named backend cannot run this call.

    Cost: "mosaic_gpu" reads the ids once and writes ranks once, and takes 2·64·E multiply-adds a
    pair on tensor cores; "count" 64 + E comparisons a pair, in nine kernels without a loop on a
    GPU, and there memory for N·E/64 counts beside the result; "sort" one stable sort of N keys.
    Source: MoEBlaze (arXiv 2601.05296), the four structures; ranks by counts of blocks instead of
    its [T, E] map.
    """
    _check(expert_ids, num_experts, method, backend)
    if checked:
        _check_ids(expert_ids, num_experts)
    ids = jnp.asarray(expert_ids, jnp.int32)
    flat = ids.reshape(-1)
    routed = (flat >= 0) & (flat < num_experts)
    if _backend(backend, method, flat.size, num_experts) == "mosaic_gpu":
        positions, offsets = _by_kernel(flat, num_experts)
    else:
        # Pairs that go nowhere belong to an expert E, behind all the others.
        group = jnp.where(routed, flat, num_experts)
        positions, offsets = _order(group, num_experts + 1, method)
        offsets = offsets[:-1]
    tokens = jnp.arange(flat.size, dtype=jnp.int32) // ids.shape[1]
    return Dispatch(
        jnp.full_like(flat, -1)
        .at[jnp.where(routed, positions, flat.size)]
        .set(tokens, unique_indices=True, mode="drop"),
        offsets,
        flat,
        jnp.where(routed, positions, -1).reshape(ids.shape),
    )


def in_expert_order(values: jax.Array, dispatch: Dispatch) -> jax.Array:
    """Values [T, K] of the pairs in the order of `expert_token_indices`; zeros for the unrouted."""
    positions = dispatch.token_index_map.reshape(-1)
    kept = jnp.where(positions >= 0, positions, positions.size)
    flat = values.reshape(-1)
    return jnp.zeros_like(flat).at[kept].set(flat, unique_indices=True, mode="drop")


class Tiles(NamedTuple):
    """Work of at most `tile_rows` pairs of one expert each; L is a static bound on their number.

    Attributes:
      expert: i32[L].
      start: first pair; i32[L].
      size: pairs, 0 behind the last tile; i32[L].
      used: tiles with pairs; i32[].
    """

    expert: Int32[jax.Array, "L"]
    start: Int32[jax.Array, "L"]
    size: Int32[jax.Array, "L"]
    used: Int32[jax.Array, ""]


def group_tiles(offsets: Int32[jax.Array, "E1"], num_pairs: int, tile_rows: int) -> Tiles:
    """Cuts each expert's pairs into tiles; L = ceil(N / tile_rows) + E tiles always suffice."""
    num_experts = offsets.shape[0] - 1
    bound = -(-num_pairs // tile_rows) + num_experts
    counts = offsets[1:] - offsets[:-1]
    tiles = (counts + tile_rows - 1) // tile_rows
    ends = jnp.cumsum(tiles)
    at = jnp.arange(bound, dtype=jnp.int32)
    # The experts whose tiles end before; compared with all ends, as a search would be a loop.
    expert = jnp.sum(ends <= at[:, None], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)
    inside = (at - (ends - tiles)[expert]) * tile_rows
    size = jnp.where(at < ends[-1], jnp.clip(counts[expert] - inside, 0, tile_rows), 0)
    return Tiles(expert, offsets[expert] + inside, size, ends[-1].astype(jnp.int32))


def _backend(
    backend: Backend | None, method: Method | None, num_pairs: int, num_experts: int
) -> Backend:
    """The backend of a call; without a name the kernel only where it does less than XLA."""

    def problem() -> str | None:
        if num_experts > SORT_FREE_EXPERTS:
            return f"there are {num_experts} experts, and it counts {SORT_FREE_EXPERTS} at most"
        return "there is nothing to count" if num_pairs == 0 else None

    if backend is None and method is not None:
        return "xla"
    return resolve("moe_dispatch", backend, problem, wgmma=True)


def _by_kernel(ids: Int32[jax.Array, "N"], num_experts: int) -> tuple[jax.Array, jax.Array]:
    """(place of each pair in expert order, offsets [E + 1]); places of the unrouted are any."""
    from pallas_kernels.moe import mosaic_gpu_dispatch  # 1 s of imports that the CPU never needs

    ranks, counts, share = mosaic_gpu_dispatch.rank_pairs(ids, num_experts=num_experts)
    starts, offsets = _starts(counts)
    owner = jnp.arange(ids.size, dtype=jnp.int32) // share
    return starts[owner, jnp.clip(ids, 0, num_experts - 1)] + ranks, offsets


def _starts(counts: Int32[jax.Array, "B G"]) -> tuple[jax.Array, jax.Array]:
    """(first place of each block's pairs of a group [B, G], group starts [G + 1])."""
    ends = jnp.cumsum(counts, axis=0)
    totals = jnp.cumsum(ends[-1], dtype=jnp.int32)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), totals])
    return offsets[:-1] + ends - counts, offsets


def _order(group: Int32[jax.Array, "N"], num_groups: int, method: Method | None):
    """Sorting wins on a CPU, which has neither a sort's many kernels to launch nor their waits."""
    count, sort = (partial(rank, num_groups=num_groups) for rank in (_by_count, _by_sort))
    if method:
        return count(group) if method == "count" else sort(group)
    if num_groups - 1 > SORT_FREE_EXPERTS:
        return sort(group)
    return lax.platform_dependent(group, cpu=sort, default=count)


def _by_count(group: Int32[jax.Array, "N"], num_groups: int) -> tuple[jax.Array, jax.Array]:
    """(place of each pair in group order, group starts [G + 1]) from counts, block by block.

    All blocks at once: a pair's rank is what its own block holds before it, which comparing it with
    the block tells, and what earlier blocks hold, which a running sum of their counts tells.
    """
    num_blocks = max(1, -(-group.size // _BLOCK))
    padded = jnp.pad(group, (0, num_blocks * _BLOCK - group.size), constant_values=num_groups)
    blocks = padded.reshape(num_blocks, _BLOCK)
    earlier = jnp.tril(jnp.ones((_BLOCK, _BLOCK), bool), -1)
    same = (blocks[:, :, None] == blocks[:, None, :]) & earlier
    inside = jnp.sum(same, axis=2, dtype=jnp.int32).reshape(-1)[: group.size]
    members = blocks[:, None, :] == jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    counts = jnp.sum(members, axis=2, dtype=jnp.int32)
    starts, offsets = _starts(counts)
    block = jnp.arange(group.size, dtype=jnp.int32) // _BLOCK
    return starts[block, group] + inside, offsets


def _by_sort(group: Int32[jax.Array, "N"], num_groups: int) -> tuple[jax.Array, jax.Array]:
    order = jnp.argsort(group, stable=True)
    places = jnp.arange(group.size, dtype=jnp.int32)
    positions = jnp.zeros_like(group).at[order].set(places, unique_indices=True)
    edges = jnp.arange(num_groups + 1, dtype=jnp.int32)
    return positions, jnp.searchsorted(group[order], edges).astype(jnp.int32)


def _check(expert_ids, num_experts: int, method: Method | None, backend) -> None:
    if num_experts < 1:
        raise ValueError(f"moe_dispatch: num_experts is {num_experts}; expected at least 1")
    if expert_ids.shape[1] > num_experts:
        raise ValueError(
            f"moe_dispatch: {expert_ids.shape[1]} experts a token, but only {num_experts} exist"
        )
    if method not in (None, "count", "sort"):
        raise ValueError(f"moe_dispatch: method is {method!r}; expected 'count', 'sort' or None")
    if method and backend == "mosaic_gpu":
        raise ValueError(
            f"moe_dispatch: method {method!r} is XLA's, and backend 'mosaic_gpu' has none; pass "
            "one or the other"
        )


def _check_ids(expert_ids, num_experts: int) -> None:
    if isinstance(expert_ids, jax.core.Tracer):
        raise ValueError(
            "moe_dispatch: checked=True looks at the ids, which a traced call cannot; check them "
            "outside jit"
        )
    ids = np.asarray(expert_ids)
    wrong = np.argwhere((ids < 0) | (ids >= num_experts))
    if wrong.size:
        token, slot = wrong[0]
        raise ValueError(
            f"moe_dispatch: slot {slot} of token {token} names expert {ids[token, slot]}; "
            f"expected 0 to {num_experts - 1} ({len(wrong)} such slots in all)"
        )
