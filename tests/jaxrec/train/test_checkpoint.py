import gc
import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.sharding import abstract_like, make_mesh, replicated, sharded_rows
from jaxrec.train import CheckpointError, CheckpointStore, CheckpointWarning, ConfigMismatch
from jaxrec.train.checkpoint_parts import DAMAGED_FOLDER, STEPS_FOLDER
from jaxrec.train.config_diff import config_differences
from jaxrec.train.fingerprint import checksum, fingerprints

# Orbax abandons its other reads when one fails; they complain as they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def abandoned_reads_are_collected():
    """Orbax leaves the other reads of a failed restore behind; they complain when collected."""
    yield
    gc.collect()


CONFIG = {"model": {"width": 8, "layers": [1, 2]}, "train": {"seed": 0}}


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "step": jnp.asarray(seed, jnp.int32),
        "table": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(5, 3)), jnp.bfloat16),
        "key": jnp.asarray(rng.integers(0, 2**32, 4), jnp.uint32),
        "none": None,
    }


def save(store, step, *, metrics=None, config=CONFIG):
    store.save(
        step,
        make_state(step),
        iterator_state={"epoch": 1, "position": step},
        config=config,
        metrics=metrics,
        progress={"history": [{"step": step, "loss": 0.1}]},
    )


def assert_same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def folder(tmp_path):
    yield tmp_path / "run"
    gc.collect()  # what was abandoned complains here and in no later test


def test_all_comes_back_as_it_was_saved(folder):
    with CheckpointStore(folder, best_metric="ndcg") as store:
        save(store, 7, metrics={"ndcg": 0.1 + 0.2, "loss": float("nan")})
    with CheckpointStore(folder) as store:
        restored = store.restore(make_state(0), config=CONFIG)
    assert_same(restored.state, make_state(7))
    assert restored.step == 7
    assert restored.iterator_state == {"epoch": 1, "position": 7}
    assert restored.config == CONFIG
    assert restored.metrics["ndcg"] == 0.1 + 0.2
    assert np.isnan(restored.metrics["loss"])
    assert restored.progress == {"history": [{"step": 7, "loss": 0.1}]}


def test_state_may_be_donated_right_after_saving(folder):
    state = make_state(3)
    expected = jax.device_get(state)
    with CheckpointStore(folder) as store:
        store.save(3, state, iterator_state={}, config={})
        jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
        assert_same(store.restore(make_state()).state, expected)


def test_newest_and_best_are_kept_also_after_reopening(folder):
    scores = [0.1, 0.9, 0.3, 0.9, 0.2]
    with CheckpointStore(folder, keep=2, best_metric="ndcg") as store:
        for step, score in enumerate(scores, start=1):
            save(store, step, metrics={"ndcg": score})
        save(store, 6)  # without metrics
        store.wait()
        assert store.steps == [2, 5, 6]
        assert store.best_step == 2
    with CheckpointStore(folder, keep=1, best_metric="ndcg") as store:
        assert store.best_step == 2
        save(store, 7, metrics={"ndcg": 0.5})
        store.wait()
        assert store.steps == [2, 7]
        assert store.restore(make_state(), step="best").step == 2
        assert store.restore(make_state()).step == 7
        assert store.restore(make_state(), step=2).metrics == {"ndcg": 0.9}


def test_asking_for_what_is_not_there(folder):
    with CheckpointStore(folder, best_metric="ndcg") as store:
        assert store.steps == []
        assert store.best_step is None
        with pytest.raises(CheckpointError, match="there is none"):
            store.restore(make_state())
        save(store, 1)
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 9 in .*; it has \[1\]"):
            store.restore(make_state(), step=9)
        with pytest.raises(CheckpointError, match="already holds a checkpoint of step 1"):
            save(store, 1)
    with CheckpointStore(folder) as store, pytest.raises(CheckpointError, match="best_metric"):
        _ = store.best_step
    with pytest.raises(CheckpointError, match="there is no folder"):
        CheckpointStore(folder / "absent", read_only=True)
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(folder, keep=0)


def test_other_configuration_lists_the_dotted_fields(folder):
    train = {"seed": 0, "new": 5, "later": None}
    other = {"model": {"width": 16, "layers": [1, 2]}, "train": train}
    with CheckpointStore(folder) as store:
        save(store, 1)
        with pytest.raises(ConfigMismatch) as caught:
            store.restore(make_state(), config=other)
        assert "model.width: saved 8, now 16" in str(caught.value)
        assert "train.new: saved absent, now 5" in str(caught.value)
        assert "layers" not in str(caught.value)
        assert "later" not in str(caught.value)
        restored = store.restore(make_state(), config=other, may_differ=("train", "model.width"))
        assert restored.config == CONFIG


def test_differences_know_tuples_and_whole_names():
    assert config_differences({"a": [1, 2]}, {"a": (1, 2)}) == []
    assert config_differences({"ab": 1}, {"ab": 2}, ("a",)) == ["ab: saved 1, now 2"]


def test_other_arrays_are_named_and_not_called_damaged(folder):
    with CheckpointStore(folder) as store:
        save(store, 1)
        wanted = make_state() | {"table": jnp.zeros((20, 4)), "extra": jnp.zeros(2)}
        with pytest.raises(CheckpointError) as caught:
            store.restore(wanted)
        assert "table: saved float32[16, 4], asked for float32[20, 4]" in str(caught.value)
        assert "extra: saved absent, asked for float32[2]" in str(caught.value)
        assert store.steps == [1]


def data_files(step_folder):
    """The files that hold array bytes."""
    return [path for path in (step_folder / "state").rglob("*") if path.parent.name == "d"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def edit_meta(step_folder):
    path = step_folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["iterator"]["position"] += 1
    path.write_text(json.dumps(meta))


DAMAGES = {
    "data truncated": lambda f: [halve(path) for path in data_files(f)],
    "data emptied": lambda f: [os.truncate(path, 0) for path in data_files(f)],
    "data deleted": lambda f: [path.unlink() for path in data_files(f)],
    "data overwritten": lambda f: [path.write_bytes(b"nonsense" * 50) for path in data_files(f)],
    "manifest truncated": lambda f: halve(f / "state" / "manifest.ocdbt"),
    "state deleted": lambda f: shutil.rmtree(f / "state"),
    "meta deleted": lambda f: shutil.rmtree(f / "meta"),
    "meta truncated": lambda f: halve(f / "meta" / "metadata"),
    "meta edited": edit_meta,
    "emptied": lambda f: [shutil.rmtree(path) for path in f.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("harm", [flip, halve, os.unlink])
def test_no_damaged_file_gives_a_wrong_state(folder, harm, tmp_path):
    """Each file of a checkpoint in turn: the state is right, or the step before is used."""
    with CheckpointStore(folder, keep=2) as store:
        save(store, 1)
        save(store, 2)
    steps = folder / STEPS_FOLDER
    pristine = tmp_path / "pristine"
    shutil.copytree(steps / "2", pristine)
    files = [path.relative_to(pristine) for path in pristine.rglob("*") if path.is_file()]
    noticed = 0
    for file in files:
        shutil.rmtree(steps / "2")
        shutil.copytree(pristine, steps / "2")
        harm(steps / "2" / file)
        with CheckpointStore(folder, read_only=True) as store, warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            restored = store.restore(make_state())
        assert_same(restored.state, make_state(restored.step))
        noticed += restored.step == 1
    assert len(files) > 5
    assert noticed >= 3


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_passed_over_and_set_aside(folder, damage):
    with CheckpointStore(folder, keep=2, best_metric="ndcg") as store:
        save(store, 1, metrics={"ndcg": 0.5})
        save(store, 2, metrics={"ndcg": 0.4})
    DAMAGES[damage](folder / STEPS_FOLDER / "2")
    with CheckpointStore(folder, keep=1, best_metric="ndcg") as store:
        with pytest.warns(CheckpointWarning, match=r"step 2 is damaged \(.+\).*using step 1"):
            restored = store.restore(make_state())
        assert_same(restored.state, make_state(1))
        assert restored.step == 1
        assert store.steps == [1]
        assert (folder / DAMAGED_FOLDER / "2").is_dir()
        save(store, 2, metrics={"ndcg": 0.7})  # the run goes on over the same step
        store.wait()
        assert store.steps == [2]
        assert_same(store.restore(make_state()).state, make_state(2))


def test_wrong_values_with_valid_files_are_found(folder):
    """What checksums of files cannot see: another step's arrays in this step's place."""
    with CheckpointStore(folder, keep=2) as store:
        save(store, 1)
        save(store, 2)
    steps = folder / STEPS_FOLDER
    shutil.rmtree(steps / "2" / "state")
    shutil.copytree(steps / "1" / "state", steps / "2" / "state")
    with (
        CheckpointStore(folder, keep=2) as store,
        pytest.warns(CheckpointWarning, match="differ from what was saved"),
    ):
        assert store.restore(make_state()).step == 1


def test_best_is_chosen_among_the_readable(folder):
    with CheckpointStore(folder, keep=3, best_metric="ndcg") as store:
        for step, score in enumerate([0.5, 0.9, 0.1], start=1):
            save(store, step, metrics={"ndcg": score})
    DAMAGES["meta truncated"](folder / STEPS_FOLDER / "2")
    with CheckpointStore(folder, best_metric="ndcg", read_only=True) as store:
        assert store.best_step == 1
    DAMAGES["data deleted"](folder / STEPS_FOLDER / "1")
    with CheckpointStore(folder, best_metric="ndcg", read_only=True) as store:
        with pytest.raises(CheckpointError, match=r"step 1: its arrays cannot be read"):
            store.restore(make_state(), step="best")
        assert store.restore(make_state()).step == 3
    assert not (folder / DAMAGED_FOLDER).exists()


def test_nothing_usable_names_every_reason(folder):
    with CheckpointStore(folder, keep=2) as store:
        save(store, 1)
        save(store, 2)
    for step in ("1", "2"):
        DAMAGES["meta deleted"](folder / STEPS_FOLDER / step)
    with CheckpointStore(folder, keep=2) as store:
        with pytest.raises(CheckpointError, match=r"no usable .* step 2: .*; step 1: "):
            store.restore(make_state())
        assert store.steps == [1, 2]  # left for someone to look at


def test_reader_changes_nothing_and_needs_no_lock(folder):
    with CheckpointStore(folder, keep=2) as writer:
        save(writer, 1)
        save(writer, 2)
        writer.wait()
        DAMAGES["data deleted"](folder / STEPS_FOLDER / "2")
        with CheckpointStore(folder, read_only=True) as reader:
            with pytest.warns(CheckpointWarning, match="left where it is"):
                assert reader.restore(make_state()).step == 1
            assert reader.steps == [1, 2]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_leaves_the_old_and_recovers(small_disk, capfd):
    state = {"a": jnp.asarray(np.random.default_rng(0).normal(size=150_000), jnp.float32)}
    with CheckpointStore(small_disk / "run", keep=2) as store:
        for step in (1, 2):
            store.save(step, state, iterator_state={}, config={})
        store.wait()
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"x" * 1_850_000)
        store.save(3, state, iterator_state={}, config={})
        with pytest.raises(CheckpointError, match=r"steps \[1, 2\]\); 0 MB are free"):
            store.wait()
        store.save(4, state, iterator_state={}, config={})
        with pytest.warns(CheckpointWarning, match="the save before this one failed"):
            store.save(5, state, iterator_state={}, config={})
        with pytest.raises(CheckpointError):
            store.wait()
        assert store.restore(state).step == 2
        ballast.unlink()
        store.save(6, state, iterator_state={}, config={})
        store.wait()
        assert store.steps == [2, 6]
        assert_same(store.restore(state).state, state)
    assert capfd.readouterr().err == ""  # no tracebacks from background threads


def test_second_run_in_a_folder_is_refused_with_its_holder(folder):
    script = f"""
        from jaxrec.train.folder_lock import lock_folder
        from pathlib import Path
        lock = lock_folder(Path({str(folder)!r}))
        print("held", flush=True)
        input()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"in use by .*{other.pid}"):
            CheckpointStore(folder)
    finally:
        other.kill()
        other.communicate()
    with CheckpointStore(folder) as store:  # the lock of a dead process holds nobody up
        save(store, 1)
        with pytest.raises(CheckpointError, match=rf"in use by .*{os.getpid()}"):
            CheckpointStore(folder)
    CheckpointStore(folder).close()


def test_failed_opening_gives_the_folder_free(folder, monkeypatch):
    def broken(*_):
        raise OSError("no manager")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_open_manager", broken)
        with pytest.raises(OSError, match="no manager"):
            CheckpointStore(folder)
    CheckpointStore(folder).close()


def test_restore_on_other_device_counts(folder):
    mesh = make_mesh({"data": 8})

    def by_rows(mesh):
        return lambda x: sharded_rows(mesh, "data") if x.shape[:1] == (16,) else replicated(mesh)

    state = make_state(5)
    placed = jax.tree.map(lambda x: jax.device_put(x, by_rows(mesh)(x)), state)
    with CheckpointStore(folder) as store:
        store.save(5, placed, iterator_state={}, config={})
        for count in (8, 4, 1):
            mesh = make_mesh({"data": count})
            restored = store.restore(abstract_like(state, by_rows(mesh))).state
            assert_same(restored, state)
            assert restored["table"].sharding == sharded_rows(mesh, "data")
            assert len(restored["table"].addressable_shards) == count
    script = f"""
        import jax, numpy as np, jax.numpy as jnp
        from jaxrec.train import CheckpointStore
        wanted = {{"step": jnp.zeros((), jnp.int32), "table": jnp.zeros((16, 4)),
                  "half": jnp.zeros((5, 3), jnp.bfloat16), "key": jnp.zeros(4, jnp.uint32),
                  "none": None}}
        with CheckpointStore({str(folder)!r}, read_only=True) as store:
            state = store.restore(wanted).state
        print(jax.device_count(), float(state["table"].sum()), state["key"].tolist())
    """
    run = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    table, key = state["table"], state["key"].tolist()
    assert done.stdout.split(maxsplit=2)[0] == "1"
    assert abs(float(done.stdout.split()[1]) - float(table.sum())) < 1e-5
    assert done.stdout.strip().endswith(str(key))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
def test_checksum_sees_every_element_and_no_sharding(dtype):
    values = np.random.default_rng(0).integers(0, 2, (8, 3))
    array = jnp.asarray(values).astype(dtype)
    split = jax.device_put(array, sharded_rows(make_mesh({"data": 8}), "data"))
    assert int(checksum(array)) == int(checksum(split))
    sums = {int(checksum(array))}
    for place in np.ndindex(array.shape):
        sums.add(int(checksum(array.at[place].set((1 - values[place]).astype(dtype)))))
    assert len(sums) == 1 + array.size
    if dtype != "bool":
        swapped = array[::-1]
        assert int(checksum(array)) != int(checksum(swapped))


def test_fingerprints_name_dtype_and_shape():
    prints = fingerprints({"b": jnp.zeros((2, 0)), "a": {"c": jnp.zeros((), jnp.int32)}})
    assert prints == {"a.c": ["int32", [], 0], "b": ["float32", [2, 0], 0]}


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CheckpointStore("here") as store:
        save(store, 1)
    assert (Path(tmp_path) / "here" / STEPS_FOLDER / "1").is_dir()
