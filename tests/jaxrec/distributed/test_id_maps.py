"""Raw ids to rows: hashing alike on host and device, and maps of known ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.distributed import IdMap, hash_ids


@pytest.mark.parametrize("padding_id", [0, -1, None])
def test_hashing_is_the_same_on_host_and_device(padding_id):
    ids = np.array([[0, 1, -1], [7, 2**31 - 1, -(2**31)]], np.int32)
    host = hash_ids(ids, 1000, padding_id=padding_id, seed=3)
    device = jax.jit(lambda x: hash_ids(x, 1000, padding_id=padding_id, seed=3))(jnp.asarray(ids))
    np.testing.assert_array_equal(device, host)
    if padding_id is not None:
        np.testing.assert_array_equal(host[ids == padding_id], padding_id)
    hashed = host if padding_id is None else host[ids != padding_id]
    assert hashed.min() >= (1 if padding_id == 0 else 0)
    assert hashed.max() < 1000


def test_hashed_ids_fill_the_table_evenly():
    rows = hash_ids(np.arange(1, 100_001), 101)
    counts = np.bincount(rows, minlength=101)
    assert counts[0] == 0, "padding's row"
    assert counts[1:].min() > 850
    assert counts[1:].max() < 1150


def test_ids_beyond_32_bits_and_other_seeds_differ():
    ids = np.array([5, 5 + 2**32, 5 - 2**40])
    assert len(set(hash_ids(ids, 2**20).tolist())) == 3
    ids = np.arange(1, 2000)
    same = hash_ids(ids, 2**20) == hash_ids(ids, 2**20, seed=1)
    assert same.sum() <= 2


def test_no_room_to_hash_to():
    with pytest.raises(ValueError, match="num_rows is 1; expected at least 2"):
        hash_ids(np.arange(3), 1)


def test_known_ids_are_numbered_from_one():
    ids = IdMap(np.array([900, -5, 2**40]))
    assert ids.num_rows == 4
    np.testing.assert_array_equal(ids.rows(np.array([[2**40], [900], [-5]])), [[3], [1], [2]])
    np.testing.assert_array_equal(ids.rows(np.array([1, 900]), unknown=0), [0, 1])
    with pytest.raises(ValueError, match=r"the id 1 is not among the 3 known ones \(2 such ids"):
        ids.rows(np.array([900, 1, 2]))
    with pytest.raises(ValueError, match="the id 7 comes twice"):
        IdMap(np.array([7, 8, 7]))


def test_a_map_of_nothing():
    ids = IdMap(np.array([], np.int64))
    np.testing.assert_array_equal(ids.rows(np.array([3]), unknown=0), [0])
    with pytest.raises(ValueError, match="not among the 0 known"):
        ids.rows(np.array([3]))
