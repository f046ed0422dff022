"""The simulator's harness catches what it promises to, and tolerances follow the dtype."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._testing import SimulationError, assert_close, simulate

X = np.arange(256, dtype=np.float32)


def test_right_kernel_returns_its_results():
    first, second = simulate("simulated_kernels:double", [((X,), {}), ((X[:128],), {})])
    np.testing.assert_array_equal(first, 2 * X)
    np.testing.assert_array_equal(second, 2 * X[:128])


def test_race_is_reported():
    with pytest.raises(SimulationError, match="data race"):
        simulate("simulated_kernels:overlap", [((X[:128],), {})])


def test_hang_is_cut_off():
    with pytest.raises(SimulationError, match="did not finish in 8 s"):
        simulate("simulated_kernels:hang", [((X[:128],), {})], timeout_s=8)


def test_exception_is_passed_on():
    with pytest.raises(SimulationError, match="no attribute 'missing'"):
        simulate("simulated_kernels:missing", [])


def test_tolerance_is_that_of_the_dtype():
    x = jnp.ones(3, jnp.float32)
    assert_close(x + 1e-6, x)
    assert_close(x + 1e-2, x, dtype=jnp.bfloat16)
    with pytest.raises(AssertionError):
        assert_close(x + 1e-2, x)
    with pytest.raises(AssertionError):
        assert_close(jnp.arange(3), jnp.arange(3) + 1)
