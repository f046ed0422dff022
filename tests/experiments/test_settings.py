from dataclasses import replace
from pathlib import Path

import pytest

from experiments.settings import find, names
from experiments.settings.base import build_model, load_split
from jaxrec.nn import HSTU, SASRec


def write_dataset(folder: Path, users: int = 30, items: int = 12) -> Path:
    lines = [
        f"u{user} " + " ".join(str((user + step) % items + 1) for step in range(3 + user % 5))
        for user in range(users)
    ]
    (folder / "sequences.txt").write_text("\n".join(lines) + "\n")
    attributes = ", ".join(f'"{item}": [{item % 3 + 1}, {item % 4 + 4}]' for item in range(1, 13))
    (folder / "item2attributes.json").write_text(f"{{{attributes}}}")
    return folder


def test_every_published_dataset_has_sasrec_and_hstu():
    for dataset in ("beauty", "sports", "toys", "ml1m", "ml20m", "books"):
        assert {f"{dataset}-sasrec", f"{dataset}-hstu"} <= set(names())


def test_every_setting_loads():
    for name in names():
        assert find(name).train.num_epochs > 0


def test_an_unknown_setting_lists_the_known():
    with pytest.raises(ValueError, match="unknown setting 'beauty-gru'; known are beauty-best"):
        find("beauty-gru")


@pytest.mark.parametrize(("name", "kind"), [("beauty-best", SASRec), ("beauty-hstu", HSTU)])
def test_models_are_built_for_the_data(tmp_path, name, kind):
    setting = find(name)
    dataset, split = load_split(write_dataset(tmp_path))
    model = build_model(setting, dataset, split, seed=0)
    assert isinstance(model, kind)
    assert model.item_embeddings().shape == (13, 64)
    assert model.config.num_attributes == (7 if setting.attributes else 0)


def test_attributes_that_are_missing_are_named(tmp_path):
    dataset, split = load_split(write_dataset(tmp_path))
    with pytest.raises(ValueError, match="the data folder has none"):
        build_model(find("beauty-best"), dataset._replace(attributes=None), split, seed=0)


def test_given_questions_are_used(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    (tmp_path / "train/input.txt").write_text("1 2 3\n2 3 4\n")
    (tmp_path / "val/input.txt").write_text("2 3\n")
    (tmp_path / "val/output.txt").write_text("4\n")
    dataset, split = load_split(tmp_path)
    raw = dataset.interactions.items.raw_of
    assert [raw(int(i)) for i in split.valid.histories.sequence(0)] == ["2", "3"]
    assert raw(int(split.valid.targets[0])) == "4"
    assert len(split.train) == 2


def test_min_count_drops_rare_items(tmp_path):
    (tmp_path / "sequences.txt").write_text("a 1 2 3 2\nb 1 2 3 1\nc 1 2 3 9\n")
    dataset, _ = load_split(tmp_path, min_count=2)
    assert sorted(dataset.interactions.items.ids.tolist()) == ["1", "2", "3"]


def test_settings_can_be_changed():
    setting = find("beauty-sasrec")
    assert replace(setting, min_count=3).min_count == 3
