"""The builder and the program checker: what they make, and what they refuse."""

import numpy as np
import pytest

from pallas_kernels.bloom import (
    MAX_DEPTH,
    BloomOp,
    bloom_build,
    check_programs,
    partition_width,
    row_hashes,
)


def build(**changes):
    arguments = {
        "bundle_words": 1,
        "num_head": 2,
        "num_hashes": 2,
        "widths": np.array([3, 1], np.int32),
        "head_items": np.array([33, 0], np.int32),
        "head_rows": np.array([1, 0], np.int32),
        "tail_items": np.array([2, 34], np.int32),
        "tail_terms": np.array([[4, 5], [7, 9]], np.uint32),
    }
    return bloom_build(40, **(arguments | changes))


def test_bits_lie_where_the_layout_says():
    rows, offsets = build()
    assert offsets.tolist() == [0, 8, 12]
    hashes = row_hashes(np.array([[4, 5]], np.uint32), 2)[0]
    want = np.zeros((12, 1), np.uint32)
    want[0] = 1 << 0  # item 0 has head value 0
    want[2 + hashes[0] % 3] = 1 << 2  # item 2, hash 0
    want[2 + 3 + hashes[1] % 3] = 1 << 2  # item 2, hash 1
    want[8 + 1] = 1 << 1  # item 33 has head value 1
    want[8 + 2] = want[8 + 3] = 1 << 2  # item 34, both hashes, width 1
    np.testing.assert_array_equal(rows, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": np.array([3], np.int32)}, "expected 2 widths"),
        ({"widths": np.array([0, 1], np.int32)}, "bundle 0 has width 0 but item 2"),
        ({"head_items": np.array([0, 40], np.int32)}, r"head_items\[1\] is 40"),
        ({"head_rows": np.array([2, 0], np.int32)}, r"head_rows\[0\] is 2"),
        ({"tail_items": np.array([0, -1], np.int32)}, r"tail_items\[1\] is -1"),
    ],
)
def test_build_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


@pytest.mark.parametrize("num_terms", [1, 10, 120])
def test_partition_width_keeps_the_false_positive_rate(num_terms):
    width = partition_width(num_terms, 4, 1e-3)
    rate = lambda w: (1 - (1 - 1 / w) ** num_terms) ** 4  # noqa: E731
    assert rate(width) <= 1e-3 * (1 + 1e-9) < rate(width - 1)
    assert partition_width(0, 4, 1e-3) == 0
    with pytest.raises(ValueError, match="expected a probability"):
        partition_width(3, 4, 0.0)


H, T, A, N = BloomOp.HEAD, BloomOp.TAIL, BloomOp.AND, BloomOp.NOT


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ([H, A], r"program 0, position 1 \(AND\) pops an empty stack"),
        ([N], r"position 0 \(NOT\) pops an empty stack"),
        ([9], r"position 0 \(9\) has an unknown opcode"),
        ([H, T], "leaves 2 masks"),
        ([T] * (MAX_DEPTH + 1) + [A] * MAX_DEPTH, "position 8 .* overflows the stack"),
    ],
)
def test_bad_programs_are_named(program, message):
    opcodes = np.array([program], np.int32)
    with pytest.raises(ValueError, match=message):
        check_programs(opcodes, np.zeros((*opcodes.shape, 2), np.uint32), num_head=1)


def test_head_rows_are_bounded_and_good_programs_pass():
    opcodes = np.array([[H, N, 0], [0, 0, 0], [H, T, A]], np.int32)
    operands = np.zeros((3, 3, 2), np.uint32)
    check_programs(opcodes, operands, num_head=1)
    operands[2, 0, 0] = 1
    with pytest.raises(ValueError, match=r"program 2, position 0 .* head rows are 0..0"):
        check_programs(opcodes, operands, num_head=1)
