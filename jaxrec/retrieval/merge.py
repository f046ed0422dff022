"""Merging what several task queries retrieved into one set of candidates a user.

A policy states a preference for every result; merging is then the same for all: an item counts
once, with its best preference, and the most preferred `num_candidates` items stay. M users, T
tasks, k results a task, K0 candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

type Policy = Callable[[jax.Array, jax.Array, int], jax.Array]
"""(ids i32[M, T, k], scores f32[M, T, k], K0) → preferences f32[M, T, k]: larger is better, -inf
leaves a result out. Results stand best first; absent ones have id -1. Must be traceable."""


class Candidates(NamedTuple):
    """Distinct items a user, most preferred first; `ids` is -1 where `valid` is False."""

    ids: Int32[Array, "M K0"]
    valid: Bool[Array, "M K0"]


def merge_candidates(
    ids: Int[Array, "M T k"],
    scores: Float[Array, "M T k"],
    *,
    policy: str | Policy = "union",
    num_candidates: int | None = None,
) -> Candidates:
    """One list of distinct candidates a user; traceable.

    Args:
      ids: each task's results, best first, distinct within a task; -1 where there is none.
      scores: of these results; the named policies go by rank alone, as the scores of different
        tasks need not be comparable.
      policy: "union" takes every task's best, then every task's second best, and so on;
        "intersection" only items that all tasks found, in the same order; "quota" gives the tasks
        equal shares (`Quota` other ones); or a `Policy` of your own.
      num_candidates: K0 (static); None keeps all, T·k.

    Raises:
      ValueError: an unknown policy, num_candidates < 1, preferences of another shape.

    Cost: one sort and one top-k of T·k numbers a user; "intersection" one more sort.
    """
    num_users, num_tasks, k = ids.shape
    size = num_tasks * k if num_candidates is None else num_candidates
    if size < 1:
        raise ValueError(f"num_candidates is {size}; expected at least 1")
    preference = _policy(policy)(ids, scores, size)
    if preference.shape != ids.shape:
        raise ValueError(
            f"the merge policy gave preferences of shape {preference.shape}; expected one for "
            f"each result, {ids.shape}"
        )
    flat = ids.astype(jnp.int32).reshape(num_users, -1)
    dislike = -preference.astype(jnp.float32).reshape(num_users, -1)
    flat, dislike = jax.lax.sort((flat, dislike), dimension=1, num_keys=2)
    first = jnp.concatenate([flat[:, :1] == flat[:, :1], flat[:, 1:] != flat[:, :-1]], axis=1)
    wanted = jnp.where(first & (flat >= 0), -dislike, -jnp.inf)
    missing = max(0, size - flat.shape[1])
    wanted = jnp.pad(wanted, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    best, places = jax.lax.top_k(wanted, size)
    valid = best > -jnp.inf
    found = jnp.take_along_axis(jnp.pad(flat, ((0, 0), (0, missing))), places, axis=1)
    return Candidates(jnp.where(valid, found, -1), valid)


@dataclass(frozen=True)
class Quota:
    """A policy that keeps a share of the candidates for each task.

    A task's best share·K0 results are in; slots that stay free, because tasks found the same items
    or too few, go to the other results as in "union".

    Attributes:
      shares: one a task, none negative; their sum counts as 1. Slots are rounded by largest
        remainder.

    Raises:
      ValueError: a negative share, or none above 0; when merging, another number than tasks.
    """

    shares: tuple[float | int, ...]

    def __post_init__(self):
        if not self.shares or min(self.shares) < 0 or not sum(self.shares) > 0:
            raise ValueError(f"the shares are {self.shares}; expected numbers from 0, some above 0")

    def __call__(self, ids: jax.Array, scores: jax.Array, num_candidates: int) -> jax.Array:
        """Preferences of the results; see `Policy`."""
        num_tasks, k = ids.shape[1:]
        if len(self.shares) != num_tasks:
            raise ValueError(f"there are {len(self.shares)} shares for {num_tasks} tasks")
        slots = jnp.asarray(quota_slots(self.shares, num_candidates))
        inside = jnp.arange(k) < slots[:, None]
        preference = _round_robin(ids) + jnp.where(inside, num_tasks * k, 0)
        return jnp.broadcast_to(preference, ids.shape)


def quota_slots(shares: Sequence[float | int], num_candidates: int) -> list[int]:
    """Whole slots in proportion to the shares, `num_candidates` in all (largest remainder)."""
    exact = [num_candidates * share / sum(shares) for share in shares]
    slots = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda t: (slots[t] - exact[t], t))
    for task in by_remainder[: num_candidates - sum(slots)]:
        slots[task] += 1
    return slots


def task_counts(ids: Int[Array, "M T k"]) -> Int32[Array, "M T k"]:
    """How many tasks found each result's item (ids distinct within a task)."""
    flat = ids.reshape(ids.shape[0], -1)
    ordered = jnp.sort(flat, axis=1)
    before = jax.vmap(lambda row, x: jnp.searchsorted(row, x, side="left"))(ordered, flat)
    upto = jax.vmap(lambda row, x: jnp.searchsorted(row, x, side="right"))(ordered, flat)
    return (upto - before).astype(jnp.int32).reshape(ids.shape)


def _round_robin(ids: jax.Array) -> Float32[Array, "T k"]:
    """Every task's best first, then every task's second best; tasks in their order."""
    num_tasks, k = ids.shape[1:]
    place = jnp.arange(k) * num_tasks + jnp.arange(num_tasks)[:, None]
    return -place.astype(jnp.float32)


def _union(ids: jax.Array, scores: jax.Array, num_candidates: int) -> jax.Array:
    return jnp.broadcast_to(_round_robin(ids), ids.shape)


def _intersection(ids: jax.Array, scores: jax.Array, num_candidates: int) -> jax.Array:
    return jnp.where(task_counts(ids) == ids.shape[1], _round_robin(ids), -jnp.inf)


def _equal_quota(ids: jax.Array, scores: jax.Array, num_candidates: int) -> jax.Array:
    return Quota((1.0,) * ids.shape[1])(ids, scores, num_candidates)


POLICIES: Mapping[str, Policy] = {
    "union": _union,
    "intersection": _intersection,
    "quota": _equal_quota,
}


def _policy(policy: str | Policy) -> Policy:
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(
                f"unknown merge policy {policy!r}; expected one of {', '.join(POLICIES)}, or a "
                "function of (ids, scores, num_candidates)"
            )
        return POLICIES[policy]
    return policy
