"""Workloads make what they announce, and their byte counts add up."""

import numpy as np

from pallas_kernels.bloom import check_programs
from pallas_kernels.bloom.workloads import WORKLOADS


def test_arrays_have_the_announced_shapes_and_valid_programs():
    workload = WORKLOADS["tiny"]
    arrays = workload.arrays(0)
    for array, shape in zip(arrays, workload.shapes(), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
    check_programs(np.asarray(arrays[2]), np.asarray(arrays[3]), num_head=workload.num_head)
    for array, again in zip(arrays, workload.arrays(0), strict=True):
        np.testing.assert_array_equal(array, again)


def test_program_selects_some_but_not_all_items():
    workload = WORKLOADS["tiny"]
    possibly, surely = workload.run(*workload.arrays(0))
    eligible = np.bitwise_count(np.asarray(possibly)).sum(1)
    assert ((eligible > 0) & (eligible < workload.num_items)).all()
    assert np.bitwise_count(np.asarray(surely)).sum() == 0


def test_floor_counts_a_row_once_however_many_queries_name_it():
    one, many = WORKLOADS["1m_q1"], WORKLOADS["1m_q64"]
    masks = 2 * 31 * 1024 * 4
    assert one.floor_bytes() == (1 + 3 * 4) * 31 * 1024 * 4 + masks
    assert (
        many.floor_bytes() == many.num_rows * 1024 * 4 + 64 * masks < many.row_bytes() + 64 * masks
    )
