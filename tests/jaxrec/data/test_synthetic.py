"""The synthetic catalogue: reproducible, well formed, and with something to learn."""

import time

import numpy as np
import pytest

from jaxrec.data import SyntheticConfig, item_counts, leave_one_out, synthetic_catalogue

SMALL = SyntheticConfig(num_users=300, num_items=120, num_topics=6, max_events=30)


def test_the_same_seed_gives_the_same_data():
    one, two = synthetic_catalogue(SMALL), synthetic_catalogue(SMALL)
    other = synthetic_catalogue(SyntheticConfig(num_users=300, num_items=120, seed=1))
    np.testing.assert_array_equal(one.interactions.item_index, two.interactions.item_index)
    np.testing.assert_array_equal(one.interactions.timestamps, two.interactions.timestamps)
    assert one.attributes.values == two.attributes.values
    assert one.attributes.values != other.attributes.values
    assert one.interactions.item_index[:50].tolist() != other.interactions.item_index[:50].tolist()


def test_users_meet_items_once_in_time_order():
    data = synthetic_catalogue(SMALL).interactions
    assert data.timestamps is not None
    assert data.num_items == 120
    assert data.num_users == 300
    for user in range(data.num_users):
        own = data.user_index == user
        items = data.item_index[own]
        assert len(set(items.tolist())) == len(items)
        assert (np.diff(data.timestamps[own]) > 0).all()
        assert 3 <= len(items) <= 30
    assert data.item_index.min() >= 1
    assert data.item_index.max() <= 120


def test_attributes_have_the_cardinalities_promised():
    data = synthetic_catalogue(SyntheticConfig(num_users=10))
    features = data.attributes.features()
    sizes = {name: len({v for row in rows for v in row}) for name, rows in features.items()}
    assert sizes["category"] == 10
    assert sizes["language"] == 8
    assert sizes["price_band"] == 5
    assert sizes["creator"] > 1000
    assert 200 < sizes["tags"] <= 300
    assert all(len(rows) == 2000 for rows in features.values())
    for name in ("category", "language", "creator", "price_band"):
        assert {len(row) for row in features[name]} == {1}
    assert {len(row) for row in features["tags"]} == {1, 2, 3, 4, 5}
    languages = [row[0] for row in features["language"]]
    assert languages.count("en") > 3 * languages.count("pt") > 0


def hit_rate_at_10(scores: np.ndarray, targets: np.ndarray) -> float:
    own = scores[np.arange(len(targets)), targets][:, None]
    rank = (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2
    return float((rank < 10).mean())


def test_order_tells_more_than_popularity_and_two_items_more_than_one():
    split = leave_one_out(synthetic_catalogue().interactions)
    train, histories, targets = split.train, split.test.histories, split.test.targets
    popularity = item_counts(train) / len(train.item_ids)

    def next_item_given(steps_back: int) -> np.ndarray:
        """Share of each item among those that came so many steps later; then the test users'."""
        table = np.zeros((train.num_items + 1,) * 2)
        users = np.repeat(np.arange(len(train)), train.lengths)
        together = users[steps_back:] == users[:-steps_back]
        earlier, later = train.item_ids[:-steps_back], train.item_ids[steps_back:]
        np.add.at(table, (earlier[together], later[together]), 1)
        table /= np.maximum(table.sum(axis=1, keepdims=True), 1)
        return table[histories.item_ids[histories.seq_offsets[1:] - steps_back]]

    by_popularity = hit_rate_at_10(np.broadcast_to(popularity, (5000, 2001)), targets)
    by_last = hit_rate_at_10(next_item_given(1) + 0.01 * popularity, targets)
    by_two = hit_rate_at_10(
        next_item_given(1) + 0.6 * next_item_given(2) + 0.01 * popularity, targets
    )
    assert by_last > 4 * by_popularity
    assert by_two > by_last + 0.03
    counts = np.sort(item_counts(train))[::-1]
    assert counts[:20].sum() > 0.05 * counts.sum()  # 1 % of the items, 5 times their even share


def test_category_follows_what_users_do():
    data = synthetic_catalogue()
    _, category = np.unique(
        ["".join(row) for row in data.attributes.values["category"]], return_inverse=True
    )
    items, users = data.interactions.item_index, data.interactions.user_index
    own = category[items]
    same_user = users[1:] == users[:-1]
    together = (own[1:] == own[:-1])[same_user].mean()
    shuffled = np.random.default_rng(0).permutation(own)
    assert together > 2 * (shuffled[1:] == shuffled[:-1]).mean()


def test_the_default_size_is_quick():
    start = time.perf_counter()
    synthetic_catalogue(SyntheticConfig(num_users=5000, num_items=2000))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 3}, "num_items is 3; expected at least 20"),
        ({"num_users": 0}, "num_users is 0"),
        ({"mean_events": 2}, "mean_events is 2; expected at least 5"),
        ({"follow_last": 0.9}, "with a sum of at most 1"),
        ({"drift": -0.1}, "drift is -0.1"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**changes)
