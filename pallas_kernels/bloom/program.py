"""The language of Bloom searches: postfix programs over a stack of (possibly, surely) masks."""

from enum import IntEnum

import numpy as np
from jaxtyping import Int32, UInt32

MAX_DEPTH = 8
"""Most masks that a program may hold on its stack at once."""


class BloomOp(IntEnum):
    """One instruction. Each works on pairs of masks: items possibly in, items surely in.

    A head row is exact; the AND of a term's tail rows may hold items that lack the term (a false
    positive) but never misses one that has it. So a tail term is possibly its AND and surely
    nothing, and NOT swaps the two masks as it complements them.
    """

    END = 0
    """Padding: does nothing."""
    HEAD = 1
    """Push head row operands[0] as both masks."""
    TAIL = 2
    """Push (AND of the K rows of a tail term, nothing)."""
    AND = 3
    """Replace the two topmost pairs by their intersection."""
    OR = 4
    """Replace the two topmost pairs by their union."""
    NOT = 5
    """Replace the topmost (p, s) by (~s, ~p)."""
    ALL = 6
    """Push every item."""
    NONE = 7
    """Push no item."""


_NEEDS = np.array([0, 0, 0, 2, 2, 1, 0, 0])
DEPTH_CHANGE = np.array([0, 1, 1, -1, -1, 0, 1, 1], np.int32)
"""What each instruction adds to the height of the stack."""


def check_programs(
    opcodes: Int32[np.ndarray, "Q P"], operands: UInt32[np.ndarray, "Q P K"], *, num_head: int
) -> None:
    """Raises ValueError for the first program that `bloom_search` could not run; host only.

    `bloom_search` itself cannot look into traced programs: what this rejects gives undefined masks
    there. Whoever compiles plans calls this once, on the finished arrays.
    """
    known = (opcodes >= 0) & (opcodes < len(BloomOp))
    safe = np.where(known, opcodes, 0)
    before = np.cumsum(DEPTH_CHANGE[safe], axis=1) - DEPTH_CHANGE[safe]
    after = before + DEPTH_CHANGE[safe]
    bad_row = (safe == BloomOp.HEAD) & (operands[:, :, 0] >= num_head)
    _fail_at(~known, opcodes, "has an unknown opcode", f"opcodes are 0..{len(BloomOp) - 1}")
    _fail_at(
        bad_row, opcodes, "names a head row that does not exist", f"head rows are 0..{num_head - 1}"
    )
    _fail_at(
        before < _NEEDS[safe],
        opcodes,
        "pops an empty stack",
        "operators follow their operands",
    )
    _fail_at(
        after > MAX_DEPTH,
        opcodes,
        "overflows the stack",
        f"programs hold at most {MAX_DEPTH} masks at once; combine operands earlier",
    )
    height = after[:, -1] if opcodes.shape[1] else np.zeros(len(opcodes), np.int32)
    if (left := np.flatnonzero(height > 1)).size:
        raise ValueError(
            f"program {left[0]} leaves {height[left[0]]} masks on the stack; "
            "it must leave one (or none, for everything): add AND or OR"
        )


def _fail_at(bad: np.ndarray, opcodes: np.ndarray, problem: str, advice: str) -> None:
    if not bad.any():
        return
    query, position = np.argwhere(bad)[0]
    code = int(opcodes[query, position])
    name = BloomOp(code).name if 0 <= code < len(BloomOp) else code
    raise ValueError(f"program {query}, position {position} ({name}) {problem}: {advice}")
