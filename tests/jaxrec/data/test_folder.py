import json

import pytest

from jaxrec.data import read_dataset


def test_sequences_with_attributes(tmp_path):
    (tmp_path / "sequences.txt").write_text("a 5 7 9\nb 7 5\n")
    (tmp_path / "item2attributes.json").write_text(json.dumps({"5": [1, 2], "9": [2, 2]}))
    dataset = read_dataset(tmp_path)
    assert len(dataset.interactions) == 5
    assert [path.name for path in dataset.files] == ["sequences.txt", "item2attributes.json"]
    assert dataset.attributes is not None
    ids, count = dataset.attributes.matrix()
    assert count == 2
    assert ids.tolist() == [[0, 0], [1, 2], [0, 0], [2, 0]]


def test_attributes_of_several_features_have_numbers_of_their_own(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,10,4.0,100\n1,20,3.0,200\n2,10,5.0,50\n"
    )
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n10,A,Drama|War\n20,B,War\n")
    dataset = read_dataset(tmp_path)
    assert dataset.attributes is not None
    ids, count = dataset.attributes.matrix()
    drama, war = (dataset.attributes.values["genres"][1]).index("Drama"), 1
    assert (drama, count) == (0, 2)
    assert ids[1].tolist() == [1, 2]
    assert ids[2].tolist() == [war + 1, 0]


@pytest.mark.parametrize(
    ("name", "text", "events"),
    [
        ("ratings.dat", "1::10::5::100\n1::20::3::200\n", 2),
        ("train/input.txt", "3 4 5\n4 5\n", 5),
        (
            "train.jsonl",
            '{"session": 1, "events": [{"aid": 7, "ts": 1000, "type": "clicks"}]}\n',
            1,
        ),
    ],
)
def test_other_layouts(tmp_path, name, text, events):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    dataset = read_dataset(tmp_path)
    assert len(dataset.interactions) == events
    assert dataset.attributes is None


def test_a_folder_without_data_says_what_it_looked_for(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"sequences\.txt, ratings\.csv.*notes\.md"):
        read_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_dataset(tmp_path / "absent")
