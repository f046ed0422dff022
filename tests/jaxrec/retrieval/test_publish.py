"""Published versions: the same answers in a fresh process, and refusals of what does not fit."""

import gc
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
    load_retriever,
    publish,
    save_retriever,
)

# Where one array cannot be read, Orbax leaves the reads of the others behind: they end after its
# event loop is closed, and are reported in whatever test comes next.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def abandoned_reads_are_collected():
    """Orbax leaves the other reads of a failed restore behind; they complain when collected."""
    yield
    gc.collect()


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
    with pytest.raises(PublishError, match=rf"2/{part} (is not what was published|cannot be read)"):
        load_retriever(copy, build_model=build_model)
    load_retriever(copy, build_model=build_model, version=1)


@pytest.mark.parametrize("part", ["tower", "index", "metadata", "vocabulary"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / "2" / part)
    with pytest.raises(PublishError, match=f"2/{part} is missing; restore"):
        load_retriever(copy, build_model=build_model)


def test_a_damaged_part_is_named(copy):
    for file in (copy / "2" / "index").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(PublishError, match="2/index cannot be read"):
        load_retriever(copy, build_model=build_model)


def test_another_model_is_refused(folder):
    def wider(config):
        return MeanTower(config["num_rows"], 2 * config["width"], rngs=nnx.Rngs(0))

    with pytest.raises(PublishError, match="2/tower"):
        load_retriever(folder, build_model=wider)


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
