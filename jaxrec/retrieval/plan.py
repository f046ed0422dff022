"""Filter trees compiled to postfix programs, and their exact evaluation on chosen items."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int32, UInt32

from jaxrec.retrieval.filters import (
    And,
    Everything,
    Filter,
    FilterError,
    Not,
    Nothing,
    Or,
    Term,
)
from jaxrec.retrieval.terms import TermCatalog, row_hashes
from pallas_kernels import BLOOM_MAX_DEPTH, BloomOp

_EXACT_STACK_BITS = 32
assert BLOOM_MAX_DEPTH < _EXACT_STACK_BITS

type _Array = jax.Array | np.ndarray


class FilterPlan(NamedTuple):
    """One postfix program a query (Q queries, P steps, K hashes); host arrays, ready for jit.

    P is rounded up to a power of two, so that few shapes are ever compiled.

    Attributes:
      opcodes: `BloomOp` numbers, padded with END; END alone is everything; i32[Q, P].
      operands: the head row, or the K hashes of a tail term; u32[Q, P, K].
      term_ids: number of the term in the catalogue, -1 for other steps; i32[Q, P].
    """

    opcodes: Int32[_Array, "Q P"]
    operands: UInt32[_Array, "Q P K"]
    term_ids: Int32[_Array, "Q P"]


def compile_plan(filters: Sequence[Filter], catalog: TermCatalog, num_hashes: int) -> FilterPlan:
    """The programs of `filters`; terms that no item has become NONE.

    Raises:
      FilterError: a filter needs a deeper stack than the search has (its deepest operands are
        evaluated first, so that takes a balanced tree of more than 2^7 alternating ANDs and ORs).
    """
    programs = [_program(tree) for tree in filters]
    longest = max((len(program) for program in programs), default=1)
    num_steps = 1 << max(longest - 1, 3).bit_length()
    opcodes = np.zeros((len(programs), num_steps), np.int32)
    term_ids = np.full((len(programs), num_steps), -1, np.int32)
    for query, program in enumerate(programs):
        terms = [(step.feature, step.value) for step in program if isinstance(step, Term)]
        numbers = iter(catalog.lookup(terms).tolist())
        for at, step in enumerate(program):
            if isinstance(step, Term):
                term_ids[query, at] = number = next(numbers)
                opcodes[query, at] = _term_op(number, catalog)
            else:
                opcodes[query, at] = step
    operands = np.zeros((*opcodes.shape, num_hashes), np.uint32)
    heads, tails = opcodes == BloomOp.HEAD, opcodes == BloomOp.TAIL
    operands[heads, 0] = catalog.head_rows[term_ids[heads]]
    operands[tails] = row_hashes(catalog.hashes[term_ids[tails]], num_hashes)
    return FilterPlan(opcodes, operands, term_ids)


def _term_op(number: int, catalog: TermCatalog) -> BloomOp:
    if number < 0:
        return BloomOp.NONE
    return BloomOp.HEAD if catalog.head_rows[number] >= 0 else BloomOp.TAIL


def _program(tree: Filter) -> list[Term | BloomOp]:
    """Postfix steps; an n-ary node starts with its deepest operand and folds in the others."""
    depth, steps = _steps(tree)
    if depth > BLOOM_MAX_DEPTH:
        raise FilterError(
            f"the filter is too entangled: it needs a stack of {depth} masks, the limit is "
            f"{BLOOM_MAX_DEPTH}; rewrite it with fewer alternating AND and OR levels"
        )
    return steps


def _steps(tree: Filter) -> tuple[int, list[Term | BloomOp]]:
    """(stack slots that the steps need, the steps)."""
    match tree:
        case Everything():
            return 1, [BloomOp.ALL]
        case Nothing():
            return 1, [BloomOp.NONE]
        case Term():
            return 1, [tree]
        case Not(operand):
            depth, steps = _steps(operand)
            return depth, [*steps, BloomOp.NOT]
        case And(operands) | Or(operands):
            op = BloomOp.AND if isinstance(tree, And) else BloomOp.OR
            parts = sorted(map(_steps, operands), key=lambda part: -part[0])
            depth, steps = parts[0][0], list(parts[0][1])
            for part_depth, part in parts[1:]:
                depth = max(depth, part_depth + 1)
                steps += part
                steps.append(op)
            return depth, steps
    raise TypeError(f"not a filter: {tree!r}")


def contains(
    offsets: Int32[_Array, "S1"],
    values: Int32[_Array, "n"],
    segments: Int[_Array, "*shape"],
    wanted: Int[_Array, "*shape"],
    longest: int,
) -> Bool[Array, "*shape"]:
    """Whether segment s (ascending values from offsets[s] to offsets[s + 1]) holds the value.

    Cost: log2(longest) gathers an element; `longest` bounds the length of a segment.
    """
    low, end = jnp.asarray(offsets)[segments], jnp.asarray(offsets)[segments + 1]
    high = end
    if values.shape[0] == 0:
        return jnp.zeros(low.shape, bool)
    last = values.shape[0] - 1
    for _ in range(max(longest, 1).bit_length()):
        middle = (low + high) // 2
        before = (jnp.asarray(values)[jnp.minimum(middle, last)] < wanted) & (low < high)
        low, high = jnp.where(before, middle + 1, low), jnp.where(before, high, middle)
    return (low < end) & (jnp.asarray(values)[jnp.minimum(low, last)] == wanted)


@functools.partial(jax.jit, static_argnames="longest")
def evaluate(
    plan: FilterPlan,
    term_offsets: Int32[_Array, "N1"],
    term_values: Int32[_Array, "n"],
    queries: Int32[_Array, "M"],
    items: Int32[_Array, "M"],
    longest: int,
) -> Bool[Array, "M"]:
    """Runs program queries[m] on the stored terms of items[m], exactly.

    The stack of a pair is the bits of one u32, its top bit 0; it starts as a single "yes", which is
    what an empty program leaves.
    """
    opcodes, term_ids = (jnp.asarray(plan[i]).T for i in (0, 2))

    def step(stack, program_step):
        ops, terms = (values[queries] for values in program_step)
        held = contains(term_offsets, term_values, items, terms, longest) | (ops == BloomOp.ALL)
        top, below = stack & 1, (stack >> 1) & 1
        pushed = (stack << 1) | held.astype(jnp.uint32)
        popped = (stack >> 2) << 1
        stack = jnp.select(
            [ops == BloomOp.END, ops == BloomOp.AND, ops == BloomOp.OR, ops == BloomOp.NOT],
            [stack, popped | (top & below), popped | (top | below), stack ^ 1],
            pushed,
        )
        return stack, None

    start = jnp.ones(queries.shape, jnp.uint32)
    return (lax.scan(step, start, (opcodes, term_ids))[0] & 1).astype(bool)
