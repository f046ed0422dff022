"""Exported retrievers: the live one's answers, from a process that has no training code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.ops.jagged import JaggedBatch
from jaxrec.retrieval import FilterError, Retriever
from jaxrec.serve import ExportError, export_retriever, load_exported
from jaxrec.serve import export as export_module

NUM_ITEMS, WIDTH, K, LENGTH = 300, 8, 10, 6
HISTORIES = [[1, 2, 3], [7], [9, 30, 4, 250, 11, 12]]
FILTERS = ["language:en", None, "NOT tag IN [3, 4] AND (language:de OR tag:9)"]


class LastItemTower(nnx.Module):
    """Embeds the last item of each sequence; holds random state, as models with dropout do."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.table = nnx.Param(jax.random.normal(rngs.params(), (NUM_ITEMS + 1, WIDTH)))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def encode(self, batch: JaggedBatch):
        return self.table[...][batch.item_ids]

    def item_embeddings(self):
        return self.table[...]


@pytest.fixture(scope="module")
def retriever():
    rng = np.random.default_rng(0)
    features = {
        "language": rng.choice(["en", "de"], NUM_ITEMS),
        "tag": np.arange(NUM_ITEMS) % 50,
    }
    return Retriever.build(LastItemTower(), features, key=jax.random.key(0), nlist=6)


@pytest.fixture(scope="module")
def folder(retriever, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "exported"
    export_retriever(
        retriever, path, k=K, batch_sizes=(1, 4), max_length=LENGTH, exclude_history=True
    )
    return path


def live_answers(retriever):
    batch = JaggedBatch(**export_module._batch(HISTORIES, 4, LENGTH))
    found = retriever(batch, retriever.compile([*FILTERS, None]), k=K, exclude_history=True)
    return [np.asarray(x)[:3] for x in found]


_SERVER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"flax", "optax", "orbax", "grain"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import json, numpy as np
from jaxrec.serve import load_exported
histories, filters = json.loads(sys.argv[2])
found = load_exported(sys.argv[1])(histories, filters)
assert not {"flax", "optax", "orbax"} & set(sys.modules)
np.savez(sys.argv[3], *map(np.asarray, found))
"""


def test_a_process_without_the_training_code_gives_the_same_bits(retriever, folder, tmp_path):
    out = tmp_path / "answers.npz"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", _SERVER, folder, json.dumps([HISTORIES, FILTERS]), out]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for own, want in zip(np.load(out).values(), live_answers(retriever), strict=True):
        assert own.dtype == want.dtype
        assert own.tobytes() == want.tobytes()


_BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"jaxrec", "pallas_kernels", "flax", "optax", "orbax"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import json, pathlib, jax, jax.export, jax.numpy as jnp, numpy as np
folder, given = pathlib.Path(sys.argv[1]), np.load(sys.argv[2])
about = json.loads((folder / "exported.json").read_text())
arrays = [
    np.load(folder / "arrays" / f"{n:05}.npy").view(jnp.dtype(dtype))
    for n, dtype in enumerate(about["dtypes"])
]
program = (folder / "programs" / "4.stablehlo").read_bytes()
parts = [
    {name.split(".")[1]: x for name, x in given.items() if name.startswith(part)}
    for part in ("batch.", "plan.")
]
found = jax.export.deserialize(bytearray(program)).call(arrays, *parts)
np.savez(sys.argv[3], *map(np.asarray, found))
"""


def test_a_program_runs_where_jaxrec_cannot_be_imported(retriever, folder, tmp_path):
    batch = export_module._batch(HISTORIES, 4, LENGTH)
    plan = load_exported(folder)._plan(FILTERS, 4)
    parts = {"batch": batch, "plan": plan}
    named = {f"{part}.{name}": x for part, own in parts.items() for name, x in own.items()}
    np.savez(tmp_path / "given.npz", **named)  # pyright: ignore[reportArgumentType]
    command = [sys.executable, "-c", _BARE, folder, tmp_path / "given.npz", tmp_path / "out.npz"]
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for own, want in zip(
        np.load(tmp_path / "out.npz").values(), live_answers(retriever), strict=True
    ):
        assert own[:3].tobytes() == want.tobytes()


def test_requests_are_padded_to_the_next_size(retriever, folder):
    exported = load_exported(folder)
    want = live_answers(retriever)
    for count in (1, 2):
        found = exported(HISTORIES[:count], FILTERS[:count])
        np.testing.assert_array_equal(found.ids, want[1][:count])
    assert sorted(exported._programs) == [1, 4]


def test_programs_are_for_both_platforms_and_hold_no_tensors(folder):
    for file in (folder / "programs").iterdir():
        program = jax.export.deserialize(bytearray(file.read_bytes()))
        assert program.platforms == ("cpu", "cuda")
        assert file.stat().st_size < 1 << 20
        assert "dense_resource" not in program.mlir_module()


def test_requests_that_do_not_fit_are_refused(folder):
    exported = load_exported(folder)
    with pytest.raises(ExportError, match="5 histories; this export takes 1 to 4"):
        exported([[1]] * 5, [None] * 5)
    with pytest.raises(ExportError, match="history 1 has 7 items; this export takes 1 to 6"):
        exported([[1], [1] * 7], [None] * 2)
    with pytest.raises(ExportError, match="1 filters for 2 histories"):
        exported([[1], [2]], [None])
    with pytest.raises(ExportError, match="larger max_filter_steps"):
        exported([[1]], [" OR ".join(f"tag:{tag}" for tag in range(40))])
    with pytest.raises(FilterError, match="langauge"):
        exported([[1]], ["langauge:en"])


def test_damaged_and_foreign_exports_are_refused(retriever, folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    about = json.loads((copy / "exported.json").read_text())
    array = copy / "arrays" / "00003.npy"
    whole = array.read_bytes()
    array.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ExportError, match=r"00003\.npy was altered"):
        load_exported(copy)
    array.unlink()
    with pytest.raises(ExportError, match=r"00003\.npy is missing"):
        load_exported(copy)
    for change, message in (
        ({"format": 99}, "format 99"),
        ({"calling_convention": 1}, "exported with jax"),
        ({"platforms": ["tpu"]}, "runs on tpu, and this machine's default is cpu"),
    ):
        (copy / "exported.json").write_text(json.dumps(about | change))
        with pytest.raises(ExportError, match=message):
            load_exported(copy)
    with pytest.raises(ExportError, match="not an exported retriever"):
        load_exported(tmp_path)
    with pytest.raises(ExportError, match="exists; export to a new folder"):
        export_retriever(retriever, folder, k=K)
    with pytest.raises(ExportError, match="expected at least one batch size"):
        export_retriever(retriever, tmp_path / "new", k=K, batch_sizes=())
