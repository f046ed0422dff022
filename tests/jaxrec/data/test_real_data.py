"""The readers on real files, where these stand beside the repository; counts are published."""

from pathlib import Path

import numpy as np
import pytest

from jaxrec.data import (
    ColumnMap,
    Interactions,
    filter_min_count,
    leave_one_out,
    read_events_jsonl,
    read_item_attributes_csv,
    read_item_attributes_json,
    read_movielens,
    read_sequences,
    read_table,
    training_batches,
)

DATA = Path(__file__).parents[4] / "shared" / "data"


def file(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the data set is not here: {name}")
    return path


def sizes(interactions: Interactions) -> tuple[int, int, int]:
    return interactions.num_users, interactions.num_items, len(interactions)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("amazon-beauty", (22_363, 12_101, 198_502)),
        ("amazon-sports", (35_598, 18_357, 296_337)),
        ("amazon-toys", (19_412, 11_924, 167_597)),
    ],
)
def test_amazon(name, expected):
    interactions = read_sequences(file(f"{name}/sequences.txt"), user_column=True)
    assert sizes(interactions) == expected
    assert len(filter_min_count(interactions, min_user=5, min_item=5)) == expected[2]  # 5-core
    attributes = read_item_attributes_json(file(f"{name}/item2attributes.json"), interactions.items)
    assert attributes.unknown_items == 0
    assert np.mean([len(row) > 0 for row in attributes.values["attribute"][1:]]) > 0.9
    split = leave_one_out(interactions)
    assert len(split.test) == expected[0]
    batches = training_batches(
        split.train,
        mode="prefixes",
        max_len=50,
        token_budget=12_800,
        max_sequences=256,
        seed=0,
        num_epochs=1,
    )
    assert batches.num_samples == expected[2] - 3 * expected[0]
    assert batches.num_batches_per_epoch == -(-batches.num_samples // 256)


def test_movielens_1m_sequences():
    interactions = read_sequences(file("ml-1m-gsasrec/train/input.txt"), user_column=False)
    assert sizes(interactions) == (6_040, 3_416, 987_019)


def test_movielens_small_by_both_readers():
    path = file("ml-latest-small/ratings.csv")
    interactions = read_movielens(path)
    assert sizes(interactions) == (671, 9_066, 100_004)
    pytest.importorskip("polars", reason="read_table needs polars")
    table = read_table(path, columns=ColumnMap("userId", "movieId", "timestamp"))
    np.testing.assert_array_equal(table.item_index, interactions.item_index)
    np.testing.assert_array_equal(table.timestamps, interactions.timestamps)
    genres = read_item_attributes_csv(
        file("ml-latest-small/movies.csv"),
        interactions.items,
        item_column="movieId",
        features={"genres": "|"},
    )
    toy_story = genres.values["genres"][interactions.items.index_of("1")]
    assert toy_story == ("Adventure", "Animation", "Children", "Comedy", "Fantasy")


def test_otto():
    path = file("otto-sample/train.jsonl")
    everything = read_events_jsonl(path)
    orders = read_events_jsonl(path, types={"orders"})
    assert everything.num_users == 20
    assert everything.timestamps is not None
    assert 1_659_300_000 <= everything.timestamps.min() <= everything.timestamps.max() < 2e9
    assert orders.report.rows_read == len(everything) + everything.report.duplicates_dropped
    assert 0 < len(orders) < len(everything)
