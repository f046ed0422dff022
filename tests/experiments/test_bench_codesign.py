"""The end-to-end benchmark: filtering the probed lists alone must give what filtering all gives."""

import dataclasses

import numpy as np

from experiments.bench_codesign import Case, differing_items, variants_of
from experiments.torch_peers import plain_masks
from pallas_kernels.ivf.workloads import WORKLOADS


def test_both_ways_give_the_same_items():
    case = Case(dataclasses.replace(WORKLOADS["tiny"], num_rows=20_000, num_lists=40, width=8))
    bloom, ivf = case.arrays()
    variants = variants_of(case, bloom, ivf)
    assert differing_items(variants) == 0
    found = np.asarray(variants["probed"]().rows)
    masks = np.asarray(case.bloom.run(*bloom).possibly)
    for rows, mask in zip(found, masks, strict=True):
        assert np.sum(rows >= 0) > 0
        kept = rows[rows >= 0]
        assert ((mask[kept // 32] >> (kept % 32)) & 1).all()


def test_a_plain_complement_loses_items():
    case = Case(WORKLOADS["tiny"])
    bloom, _ = case.arrays()
    plain = np.asarray(plain_masks(case.bloom, bloom))
    possibly = np.asarray(case.bloom.run(*bloom).possibly)
    assert not (plain & ~possibly).any()
    assert (possibly & ~plain).any()
