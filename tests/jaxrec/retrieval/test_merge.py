import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.retrieval.merge import Quota, merge_candidates, quota_slots, task_counts


@st.composite
def results(draw):
    """ids [M, T, k] as searches give them: distinct within a task, absent ones last."""
    users, tasks, k = draw(st.sampled_from([(1, 1, 3), (2, 3, 5), (3, 2, 4)]))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    ids = np.full((users, tasks, k), -1, np.int32)
    for user, task in np.ndindex(users, tasks):
        filled = rng.integers(0, k + 1)
        ids[user, task, :filled] = rng.choice(12, filled, replace=False)
    return ids


def oracle_union(lists, slots, size):
    """Quota places first, then round robin; distinct."""
    order = [
        (rank >= slots[task], rank, task)
        for task, found in enumerate(lists)
        for rank in range(len(found))
    ]
    merged = []
    for _, rank, task in sorted(order):
        item = lists[task][rank]
        if item >= 0 and item not in merged:
            merged.append(int(item))
    return merged[:size]


def listed(candidates):
    for ids, valid in zip(np.asarray(candidates.ids), np.asarray(candidates.valid), strict=True):
        assert (ids[~valid] == -1).all()
        assert (np.diff(valid.astype(int)) <= 0).all()  # absent ones stand last
        yield ids[valid].tolist()


merge = jax.jit(merge_candidates, static_argnames=("policy", "num_candidates"))


def merged(ids, **kwargs):
    return list(listed(merge(ids, np.zeros(ids.shape, np.float32), **kwargs)))


@settings(max_examples=40, deadline=None)
@given(results(), st.sampled_from([1, 5, 20]))
def test_named_policies_match_their_definition(ids, size):
    tasks, k = ids.shape[1:]
    everything, equal = [k] * tasks, quota_slots([1] * tasks, size)
    found_by_all = [set.intersection(*map(set, user.tolist())) - {-1} for user in ids]
    union = [oracle_union(user, everything, size) for user in ids]
    assert merged(ids, num_candidates=size) == union
    assert merged(ids, policy="quota", num_candidates=size) == [
        oracle_union(user, equal, size) for user in ids
    ]
    whole = [oracle_union(user, everything, tasks * k) for user in ids]
    assert merged(ids, policy="intersection", num_candidates=size) == [
        [item for item in items if item in common][:size]
        for items, common in zip(whole, found_by_all, strict=True)
    ]


def test_quota_keeps_each_tasks_share_and_hands_on_free_slots():
    ids = np.asarray([[[1, 2, 3, 4], [1, 5, 6, -1]]])
    assert merged(ids, policy=Quota((0.75, 0.25)), num_candidates=4) == [[1, 2, 3, 5]]
    assert merged(ids, policy=Quota((0, 1)), num_candidates=4) == [[1, 5, 6, 2]]


@pytest.mark.parametrize(
    ("shares", "size", "slots"),
    [([1, 1, 1], 4, [2, 1, 1]), ([0.5, 0.3, 0.2], 10, [5, 3, 2]), ([0, 2], 3, [0, 3])],
)
def test_quota_slots_use_every_slot(shares, size, slots):
    assert quota_slots(shares, size) == slots


def test_own_policy_decides_by_score_and_ids_stay_distinct():
    ids = jnp.asarray([[[1, 2], [2, 3]]])
    scores = jnp.asarray([[[0.9, 0.1], [0.8, 0.7]]], jnp.float32)

    def by_score(ids, scores, num_candidates):
        return jnp.where(scores > 0.15, scores, -jnp.inf)

    found = merge_candidates(ids, scores, policy=by_score, num_candidates=3)
    assert list(listed(found)) == [[1, 2, 3]]


def test_merging_is_traceable_and_keeps_its_shape():
    ids = jnp.asarray([[[4, 1], [-1, -1]], [[-1, -1], [-1, -1]]])
    scores = jnp.zeros(ids.shape)
    jitted = jax.jit(lambda ids, scores: merge_candidates(ids, scores, num_candidates=7))
    found = jitted(ids, scores)
    assert found.ids.shape == found.valid.shape == (2, 7)
    assert list(listed(found)) == [[4, 1], []]


def test_task_counts_count_each_task_once():
    assert task_counts(jnp.asarray([[[1, 2], [2, 3], [2, -1]]])).tolist() == [
        [[1, 3], [3, 1], [3, 1]]
    ]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"policy": "best"}, "unknown merge policy 'best'; expected one of union, intersection"),
        ({"num_candidates": 0}, "at least 1"),
        ({"policy": Quota((1.0,))}, "1 shares for 2 tasks"),
        ({"policy": lambda ids, scores, n: scores[0]}, "expected one for each result"),
    ],
)
def test_errors_say_what_was_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        merged(np.zeros((1, 2, 3), np.int32), **kwargs)
    with pytest.raises(ValueError, match="some above 0"):
        Quota((0, 0))
