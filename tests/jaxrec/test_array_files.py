"""Arrays survive their files bit for bit, whatever their shape, dtype and number of pieces."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec import array_files
from jaxrec.array_files import read_array, write_array


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (100, 3), (3, 2, 50)])
@pytest.mark.parametrize("on_device", [True, False])
def test_round_trip(tmp_path, monkeypatch, dtype, shape, on_device):
    monkeypatch.setattr(array_files, "PIECE_BYTES", 64)
    values = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    write_array(tmp_path / "x.npy", values if on_device else np.asarray(values))
    found = read_array(tmp_path / "x.npy", dtype)
    assert (found.shape, found.dtype) == (values.shape, values.dtype)
    np.testing.assert_array_equal(found, values)


def test_numpy_reads_them_too(tmp_path):
    values = np.arange(12).reshape(3, 4)
    write_array(tmp_path / "x.npy", values)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), values)


def test_a_cut_file_is_an_error(tmp_path):
    write_array(tmp_path / "x.npy", np.arange(12.0))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match="reshape"):
        read_array(tmp_path / "x.npy", "float32")
