"""Workloads make what they announce, and their counts add up."""

import numpy as np
import pytest

from pallas_kernels.hstu_attention.workloads import WORKLOADS
from pallas_kernels.softmax_attention.workloads import WORKLOADS as SOFTMAX_WORKLOADS


@pytest.mark.parametrize("workloads", [WORKLOADS, SOFTMAX_WORKLOADS], ids=["hstu", "softmax"])
def test_arrays_have_the_announced_shapes(workloads):
    workload = workloads["tiny"]
    arrays = workload.arrays(0)
    for array, shape, again in zip(arrays, workload.shapes(), workload.arrays(0), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        np.testing.assert_array_equal(array, again)
    out = np.asarray(workload.run(*arrays))
    assert out.shape == arrays[2].shape
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", WORKLOADS)
def test_lengths_fill_the_slots(name):
    workload = WORKLOADS[name]
    lengths = workload.lengths(0)
    assert ((lengths >= 0) & (lengths <= workload.max_len)).all()
    assert 0.8 * workload.num_tokens <= lengths.sum() <= workload.num_tokens


def test_floors():
    workload = WORKLOADS["tiny"]
    assert workload.floor_bytes() == sum(array.nbytes for array in workload.arrays(0)[:3]) * 4 // 3
    pairs = sum(int(n) * (int(n) + 1) // 2 for n in workload.lengths(0))
    assert workload.floor_flops() == 4 * workload.heads * workload.width * pairs
