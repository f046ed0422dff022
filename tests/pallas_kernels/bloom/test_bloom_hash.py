"""Host and device hash alike, and as published."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bloom import mix64, row_hashes


def test_the_mix_is_splitmix64():
    """The first numbers of the generator with seed 0."""
    want = np.array([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], np.uint64)
    steps = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    np.testing.assert_array_equal(mix64(steps), want)
    np.testing.assert_array_equal(
        row_hashes(np.zeros((1, 2), np.uint32), 3)[0], want >> np.uint64(32)
    )


def test_device_and_host_give_the_same_bits():
    rng = np.random.default_rng(0)
    terms = rng.integers(0, 2**32, (1_000, 2), dtype=np.uint32)
    terms[:4] = [[0, 0], [2**32 - 1, 2**32 - 1], [2**32 - 1, 0], [0, 2**32 - 1]]
    device = jax.jit(lambda terms: row_hashes(terms, 7))(jnp.asarray(terms))
    np.testing.assert_array_equal(device, row_hashes(terms, 7))


def test_hashes_fill_all_rows_evenly():
    """Pearson's statistic of consecutive terms over 50 rows, for each of the K numbers."""
    terms = np.zeros((20_000, 2), np.uint32)
    terms[:, 0] = np.arange(20_000)
    for column in np.asarray(row_hashes(terms, 4)).T:
        counts = np.bincount(column % 50, minlength=50)
        assert ((counts - 400) ** 2 / 400).sum() < 90  # 49 degrees of freedom: p = 0.0003
