"""One of two processes with two devices each that share a folder of checkpoints.

python checkpoint_worker.py <port> <number> <folder> <folder with a checkpoint of one process>
"""

import os
import resource
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.distributed import LaunchConfig, launch
from jaxrec.sharding import make_mesh, replicated, sharded_rows
from jaxrec.train import CheckpointError, CheckpointStore, CheckpointWarning

CONFIG = {"width": 4}


def values(step):
    rng = np.random.default_rng(step)
    return {
        "table": rng.normal(size=(16, 40)).astype(np.float32),
        "half": np.asarray(jnp.asarray(rng.normal(size=(6, 3)), jnp.bfloat16)),
        "step": np.asarray(step, np.int32),
        "local": np.arange(3, dtype=np.uint32) + step,
    }


def placed(step, mesh):
    """`table` split over the devices, the rest on each, `local` of no mesh."""
    shardings = {"table": sharded_rows(mesh, "data")}
    return {
        name: jnp.asarray(value)
        if name == "local"
        else jax.make_array_from_callback(
            value.shape, shardings.get(name, replicated(mesh)), value.__getitem__
        )
        for name, value in values(step).items()
    }


def assert_same(state, step):
    for name, wanted in values(step).items():
        for shard in state[name].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), wanted[shard.index])


def save(store, step, mesh):
    store.save(step, placed(step, mesh), iterator_state={"at": step}, config=CONFIG)


def flip(file):
    data = bytearray(file.read_bytes())
    data[-2] ^= 0xFF
    file.write_bytes(data)


def damage(folder, step, part, harm):
    """Harms the largest file of a part."""
    files = (folder / "parts" / str(step) / str(part)).glob("*.npy")
    harm(max(files, key=lambda file: file.stat().st_size))


def check_saving(folder, mesh, launched):
    with CheckpointStore(folder, keep=3) as store:
        for step in (1, 2, 3, 4):
            save(store, step, mesh)
        store.wait()
        assert store.steps == [2, 3, 4]
        restored = store.restore(placed(0, mesh), config=CONFIG)
        assert restored.step == 4
        assert restored.iterator_state == {"at": 4}
        assert_same(restored.state, 4)
        assert_same(store.restore(placed(0, mesh), step=2).state, 2)
        # A disk that is full for process 1 alone.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not launched.is_first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
        save(store, 5, mesh)
        with pytest.raises(CheckpointError, match=r"process 1: OSError.* large.*steps \[2, 3, 4\]"):
            store.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        save(store, 5, mesh)
        store.wait()
        assert store.steps == [3, 4, 5]
        launched.barrier("saved", timeout=30)
    assert sorted(path.name for path in (folder / "parts").iterdir()) == ["3", "4", "5"]


def check_damage(folder, mesh, launched):
    if launched.is_first:
        damage(folder, 5, 1, flip)  # seen in its checksum, by all
        damage(folder, 4, 1, os.unlink)  # seen by the process that reads the file
        (folder / "parts" / "9" / "0").mkdir(parents=True)  # a save that was cut off
    launched.barrier("damaged", timeout=30)
    with CheckpointStore(folder, keep=3) as store, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        restored = store.restore(placed(0, mesh))
        assert restored.step == 3
        assert_same(restored.state, 3)
        assert store.steps == [3]
    texts = [str(warning.message) for warning in told if warning.category is CheckpointWarning]
    assert len(texts) == (2 if launched.is_first else 0), texts
    assert (folder / "damaged" / "5" / "parts" / "1").is_dir()
    assert not (folder / "parts" / "9").exists()


def check_single(single, mesh):
    """What one process saved."""
    with CheckpointStore(single) as store:
        restored = store.restore(placed(0, mesh))
        assert restored.step == 7
        assert_same(restored.state, 7)
        save(store, 8, mesh)


def main(port, number, folder, single):
    jax.config.update("jax_num_cpu_devices", 2)
    config = LaunchConfig(f"localhost:{port}", 2, number, heartbeat_timeout=10, exit_timeout=20)
    with launch(config) as launched:
        mesh = make_mesh({"data": jax.device_count()})
        check_saving(folder, mesh, launched)
        check_damage(folder, mesh, launched)
        check_single(single, mesh)
        with pytest.raises(CheckpointError, match=r"process 1: .* is not the folder of process 0"):
            CheckpointStore(folder.with_name(f"own-{number}"))
        print("all held", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
