"""Computation beside transfers: the copying kernel, simulated, and the table."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sm_tax
from pallas_kernels._testing import simulate
from pallas_kernels._timing import Timing


def test_simulated_blocks_copy_everything_without_races():
    x = np.arange(2 * 6 * 64 * 128, dtype=np.int32).reshape(-1, 128)
    cases = [((x, 2, np.array([n], np.int32)), {}) for n in (1, 2)]
    for copied in simulate("experiments.sm_tax:block_copy", cases):
        np.testing.assert_array_equal(copied, x)


def test_rows_that_the_blocks_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of 256 rows of 128"):
        sm_tax.block_copy(jnp.zeros((320, 128), jnp.int32), 4, jnp.ones(1, jnp.int32))


def test_slowdown_is_the_time_of_both_over_that_of_the_computation():
    both = {"copy engine": Timing((101.0,)), "16 blocks": Timing((125.0, 125.0))}
    rows = sm_tax.slowdowns(Timing((100.0,)), {"copy engine": 80.0, "16 blocks": 81.0}, both)
    assert [(row["beside"], row["slowdown"]) for row in rows] == [
        ("copy engine", 1.01),
        ("16 blocks", 1.25),
    ]
    assert sm_tax.picture([{"work": "matmul", **row} for row in rows]).startswith(b"\x89PNG")


def test_buffers_fit_all_numbers_of_blocks():
    buffer = sm_tax.buffer_of(10e6, (4, 8, 12))
    assert buffer.shape[0] % (64 * 24) == 0
    assert abs(buffer.nbytes - 10e6) < 64 * 24 * 512
