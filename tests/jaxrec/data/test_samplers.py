"""Samplers: exact probabilities of the tables, and draws that follow them."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data import PopularitySampler, SequenceDataset, UniformSampler, item_counts

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=40).map(lambda c: np.array([0, *c]))


def table_probabilities(sampler: PopularitySampler) -> np.ndarray:
    """The probability of each item (index 0 is padding) that the alias table really gives."""
    threshold = np.asarray(sampler.threshold, dtype=np.float64)
    q = np.append(0.0, threshold / len(threshold))
    np.add.at(q, np.asarray(sampler.alias), (1 - threshold) / len(threshold))
    return q


def test_item_counts():
    dataset = SequenceDataset.from_sequences([[1, 3, 3], [], [3]], num_items=4)
    assert item_counts(dataset).tolist() == [0, 1, 0, 3, 0]


@settings(deadline=None, max_examples=200)
@given(counts=COUNTS, alpha=st.sampled_from([0, 0.5, 0.75, 1]))
def test_alias_tables_are_exact(counts, alpha):
    sampler = PopularitySampler.from_counts(counts, alpha=alpha)
    weights = (counts[1:] + 1.0) ** alpha
    q = weights / weights.sum()
    np.testing.assert_allclose(table_probabilities(sampler)[1:], q, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(sampler.log_q[1:], np.log(q), rtol=1e-5, atol=1e-6)
    assert sampler.log_q[0] == 0
    assert ((sampler.alias >= 1) & (sampler.alias < len(counts))).all()


@settings(deadline=None, max_examples=50)
@given(counts=COUNTS)
def test_log_uniform_follows_ranks(counts):
    sampler = PopularitySampler.log_uniform(counts)
    q = table_probabilities(sampler)[1:]
    order = sorted(range(len(q)), key=lambda i: (-counts[i + 1], i))
    law = np.log((np.arange(len(q)) + 2) / (np.arange(len(q)) + 1))
    np.testing.assert_allclose(q[order], law / law.sum(), rtol=1e-4, atol=1e-7)


def test_draws_follow_log_q_inside_jit_and_never_give_padding():
    rng = np.random.default_rng(0)
    counts = np.append(0, rng.zipf(1.5, 50))
    draw = jax.jit(lambda sampler, key: sampler.draw(key, (400, 500)))
    for sampler in (PopularitySampler.from_counts(counts), UniformSampler.create(50)):
        items = np.asarray(draw(sampler, jax.random.key(0)))
        assert items.dtype == np.int32
        share = np.bincount(items.ravel(), minlength=51) / items.size
        q = np.exp(sampler.log_q[1:])
        assert share[0] == 0
        assert abs(q.sum() - 1) < 1e-5
        # 200,000 draws: five standard errors of a share q.
        assert (np.abs(share[1:] - q) < 5 * np.sqrt(q / items.size)).all()


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([0], {}, "there are 0 items"),
        ([0, 1, -2], {}, r"counts\[2\] is -2"),
        ([0, 1], {"smoothing": 0}, "smoothing is 0; expected more than 0"),
    ],
)
def test_samplers_that_cannot_be(counts, options, message):
    with pytest.raises(ValueError, match=message):
        PopularitySampler.from_counts(np.array(counts), **options)


def test_no_items():
    with pytest.raises(ValueError, match="there are 0 items"):
        UniformSampler.create(0)
