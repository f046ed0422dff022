"""Published versions: the same answers in a fresh process, and refusals of what does not fit."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from mean_tower import MeanTower

from jaxrec.ops.jagged import JaggedBatch
from jaxrec.retrieval import (
    ItemIndex,
    PublishError,
    PublishWarning,
    load_retriever,
    publish,
    save_retriever,
)

NUM_ITEMS, WIDTH = 300, 8
CONFIG = {"num_rows": NUM_ITEMS + 1, "width": WIDTH}
FILTERS = ["language:en", "NOT tag:3"]


def build_model(config):
    return MeanTower(**config, rngs=nnx.Rngs(99))


def features():
    rng = np.random.default_rng(0)
    return {"language": rng.choice(["en", "de"], NUM_ITEMS), "tag": np.arange(NUM_ITEMS) % 50}


BATCH = JaggedBatch(
    np.arange(1, 9, dtype=np.int32),
    np.array([0, 4, 8], np.int32),
    np.array([3, 7], np.int32),
    np.zeros(2, np.int32),
    np.zeros(8, np.int32),
)


def answers(retriever):
    return [np.asarray(x) for x in retriever(BATCH, retriever.compile(FILTERS), k=10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    for seed in (1, 2):
        model = MeanTower(**CONFIG, rngs=nnx.Rngs(seed))
        names = [f"id {item}" for item in range(1, NUM_ITEMS + 1)]
        version = publish(
            model, features(), folder=root, model_config=CONFIG, nlist=6, vocabulary=names
        )
        assert version == seed
    return root


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_restored_equals_built(folder, tmp_path):
    first = load_retriever(folder, build_model=build_model, version=1)
    assert save_retriever(first, tmp_path / "again", model_config=CONFIG) == 1
    again = load_retriever(tmp_path / "again", build_model=build_model)
    for a, b in zip(answers(first), answers(again), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(first.index), jax.tree.leaves(again.index), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert isinstance(again.index, ItemIndex)
    assert isinstance(first.index, ItemIndex)
    assert again.index.nprobe == first.index.nprobe
    assert again.raw_ids(np.array([[2]], np.int32)) == [["id 2"]]
    second = load_retriever(folder, build_model=build_model)
    assert not np.array_equal(first.queries(BATCH), second.queries(BATCH))


@pytest.mark.parametrize("part", ["tower", "index"])
def test_parts_of_different_versions_are_refused(copy, part):
    shutil.rmtree(copy / "2" / part)
    shutil.copytree(copy / "1" / part, copy / "2" / part)
    with pytest.raises(PublishError, match=rf"2/{part}/\S+\.npy was altered.* load another"):
        load_retriever(copy, build_model=build_model, version=2)
    load_retriever(copy, build_model=build_model, version=1)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def alter(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("tower/00000.npy", alter, "was altered"),
        ("index/00003.npy", truncate, r"has \d+ bytes of \d+"),
        ("index/00001.npy", Path.unlink, "is missing"),
        ("files.json", truncate, "is damaged"),
        ("files.json", Path.unlink, "is missing: the version was never finished"),
    ],
)
def test_a_damaged_file_is_named_and_the_version_before_used(folder, copy, name, harm, message):
    harm(copy / "2" / name)
    with pytest.raises(PublishError, match=f"2/{name} {message}"):
        load_retriever(copy, build_model=build_model, version=2)
    with pytest.warns(PublishWarning, match=f"2/{name} {message}.*: version 1 is used"):
        found = load_retriever(copy, build_model=build_model)
    first = load_retriever(folder, build_model=build_model, version=1)
    for a, b in zip(answers(found), answers(first), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_a_whole_version_every_damage_is_told(copy):
    for version in ("1", "2"):
        (copy / version / "index" / "00000.npy").unlink()
    with pytest.raises(PublishError, match=r"2/index/00000\.npy .*1/index/00000\.npy is missing"):
        load_retriever(copy, build_model=build_model)


def test_the_next_version_never_overwrites_an_unfinished_one(copy):
    (copy / "2" / "files.json").unlink()
    with pytest.warns(PublishWarning, match="never finished"):
        first = load_retriever(copy, build_model=build_model)
    assert save_retriever(first, copy, model_config=CONFIG) == 3
    load_retriever(copy, build_model=build_model)


def test_hashes_need_not_be_checked(copy):
    alter(copy / "2" / "tower" / "00000.npy")
    second = load_retriever(copy, build_model=build_model, version=2, check=False)
    assert not np.array_equal(
        answers(second)[0], answers(load_retriever(copy, build_model=build_model, version=1))[0]
    )


def test_items_without_any_attribute_are_published(tmp_path):
    model = MeanTower(**CONFIG, rngs=nnx.Rngs(1))
    publish(model, {"tag": [None] * NUM_ITEMS}, folder=tmp_path, model_config=CONFIG, nlist=6)
    found = load_retriever(tmp_path, build_model=build_model)
    assert found(BATCH, found.compile(["NOT tag:3", "tag:3"]), k=5).filled.tolist() == [5, 0]


def test_another_model_is_refused(folder):
    def wider(config):
        return MeanTower(config["num_rows"], 2 * config["width"], rngs=nnx.Rngs(0))

    with pytest.raises(PublishError, match=r"table is float32\[301, 8\] there and .+16\] in"):
        load_retriever(folder, build_model=wider)
    with pytest.raises(PublishError, match=r"2/tower: \w+ is absent there"):
        load_retriever(folder, build_model=lambda _: nnx.Linear(1, 1, rngs=nnx.Rngs(0)))


def test_no_such_version_or_folder(folder, tmp_path):
    with pytest.raises(PublishError, match="no version 7; published are: 1, 2"):
        load_retriever(folder, build_model=build_model, version=7)
    with pytest.raises(PublishError, match="no version; published are: none"):
        load_retriever(tmp_path, build_model=build_model)
    with pytest.raises(PublishError, match="is not a folder"):
        load_retriever(tmp_path / "nowhere", build_model=build_model)


_FRESH = """
import sys
import numpy as np
from test_publish import answers, build_model
from jaxrec.retrieval import load_retriever
retriever = load_retriever(sys.argv[1], build_model=build_model)
np.savez(sys.argv[2], *answers(retriever))
"""


def test_a_fresh_process_gives_the_same_bits(folder, tmp_path):
    out = tmp_path / "answers.npz"
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", _FRESH, folder, out],
        check=True, timeout=240, cwd=here,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{here}:{here.parents[2]}"},
    )  # fmt: skip
    published = load_retriever(folder, build_model=build_model)
    fresh = np.load(out)
    for name, want in zip(fresh.files, answers(published), strict=True):
        assert fresh[name].tobytes() == want.tobytes()


_STREAM = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from mean_tower import MeanTower
from jaxrec.array_files import PIECE_BYTES
from jaxrec.retrieval import BloomIndex, IVFIndex, ItemIndex, Retriever
from jaxrec.retrieval import load_retriever, save_retriever

def peak_growth(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before, result = status("VmRSS"), call()
    return status("VmHWM") - before, result

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

rows = 1 << 20
ivf = IVFIndex.blank(64, rows, "ip", "float32")
vectors = jnp.asarray(np.random.default_rng(0).random((rows, 64), np.float32))
bloom = BloomIndex.build({"tag": [1]}, order=np.where(np.arange(rows) == 7, 0, -1))
index = ItemIndex(dataclasses.replace(ivf, vectors=vectors), bloom, {}, 1, ((1.0, 1.0),))
size = sum(x.nbytes for x in jax.tree.leaves(index))
def model(_=None):
    return MeanTower(9, 64, rngs=nnx.Rngs(0))
retriever = Retriever(model(), index)
saving, _ = peak_growth(lambda: save_retriever(retriever, sys.argv[1]))
del ivf, vectors, index, retriever
loading, found = peak_growth(lambda: load_retriever(sys.argv[1], build_model=model))
want = np.random.default_rng(0).random((rows, 64), np.float32)
np.testing.assert_array_equal(found.index.ivf.vectors, want)
print(size, PIECE_BYTES, saving, loading)
"""


@pytest.mark.slow
def test_tensors_are_streamed_to_disk_and_back(tmp_path):
    """Beside the index: less than three pieces to save it, four to load it; 341 MB of index."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", _STREAM, tmp_path], timeout=240, capture_output=True, text=True,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{here}:{here.parents[2]}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size, piece, saving, loading = map(int, done.stdout.split())
    assert size > 5 * piece
    assert saving < 3 * piece
    assert loading < size + 4 * piece
