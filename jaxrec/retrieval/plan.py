"""Filter trees compiled to postfix programs, and their exact evaluation on chosen items."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
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
from jaxrec.retrieval.terms import TermCatalog, split_hashes
from pallas_kernels import BLOOM_MAX_DEPTH, BloomOp, bloom_row_hashes

_EXACT_STACK_BITS = 32
assert BLOOM_MAX_DEPTH < _EXACT_STACK_BITS

type _Array = jax.Array | np.ndarray


@jax.tree_util.register_static
@dataclass(frozen=True)
class CatalogToken:
    """Names the catalogue whose term numbers a plan uses; see `TermCatalog.accepts`.

    Static to `jax.jit`, so a plan for another catalogue is refused even while tracing.
    """

    value: int


class FilterPlan(NamedTuple):
    """Postfix programs of the filters of Q queries (F filters, P steps, K hashes).

    Host arrays, ready for jit. P is rounded up to a power of two, so that few shapes are ever
    compiled.

    Attributes:
      opcodes: `BloomOp` numbers, padded with END; END alone is everything; i32[F, P].
      operands: the head row, or the K hashes of a tail term; u32[F, P, K].
      term_ids: number of the term in the catalogue, -1 for other steps; i32[F, P].
      plan_of_query: the filter of each query, i32[Q]; None means that query q has filter q.
      catalog: whose terms these are.
    """

    opcodes: Int32[_Array, "F P"]
    operands: UInt32[_Array, "F P K"]
    term_ids: Int32[_Array, "F P"]
    plan_of_query: Int32[_Array, "Q"] | None
    catalog: CatalogToken

    @property
    def num_queries(self) -> int:
        """Q."""
        return (self.opcodes if self.plan_of_query is None else self.plan_of_query).shape[0]

    def distinct(self) -> "FilterPlan":
        """The filters themselves, as if each were of one query."""
        return self._replace(plan_of_query=None)

    def of_each_query(self, masks: UInt32[Array, "F words"]) -> UInt32[Array, "Q words"]:
        """Masks of the queries from those of the filters."""
        return masks if self.plan_of_query is None else masks[jnp.asarray(self.plan_of_query)]

    def for_queries(self, plan_of_query: Int[_Array, "Q"]) -> "FilterPlan":
        """The same filters for other queries: query q takes what query plan_of_query[q] had.

        Filters are evaluated once each, however many queries have them: 12 queries of one user
        share one with `plan.for_queries(np.repeat(np.arange(num_users), 12))`.

        Raises:
          ValueError: an entry that is not a query of this plan.
        """
        chosen = plan_of_query
        if isinstance(chosen, np.ndarray) and chosen.size:
            if chosen.min() < 0 or chosen.max() >= self.num_queries:
                raise ValueError(
                    f"plan_of_query names the queries {chosen.min()} to {chosen.max()}; the plan "
                    f"has 0 to {self.num_queries - 1}"
                )
            chosen = chosen.astype(np.int32)
        if self.plan_of_query is not None:
            chosen = self.plan_of_query[chosen]
        return self._replace(plan_of_query=chosen)


def compile_plan(
    filters: Sequence[Filter], catalog: TermCatalog, num_hashes: int, *, share: bool = False
) -> FilterPlan:
    """The programs of `filters`; terms that no item has become NONE.

    With `share`, equal filters become one program; see `BloomIndex.compile`.

    Raises:
      FilterError: a filter needs a deeper stack than the search has (its deepest operands are
        evaluated first, so that takes a balanced tree of more than 2^7 alternating ANDs and ORs).
    """
    plan_of_query = None
    if share:
        numbers: dict[Filter, int] = {}
        plan_of_query = np.array([numbers.setdefault(f, len(numbers)) for f in filters], np.int32)
        rest = (1 << max(len(numbers) - 1, 0).bit_length()) - len(numbers)
        filters = [*numbers, *[Everything()] * rest]
    programs = [_program(tree) for tree in filters]
    longest = max((len(program) for program in programs), default=1)
    num_steps = 1 << max(longest - 1, 3).bit_length()
    terms = [(s.feature, s.value) for program in programs for s in program if isinstance(s, Term)]
    found = catalog.numbers_of(catalog.hashes_of(terms))
    opcodes = np.zeros((len(programs), num_steps), np.int32)
    is_term = np.zeros(opcodes.shape, bool)
    for query, program in enumerate(programs):
        is_term[query, : len(program)] = [isinstance(step, Term) for step in program]
        opcodes[query, : len(program)] = [0 if isinstance(step, Term) else step for step in program]
    term_ids = np.full(opcodes.shape, -1, np.int32)
    term_ids[is_term] = found
    head_rows = catalog.head_rows_of(found)
    kinds = np.where(head_rows >= 0, BloomOp.HEAD, BloomOp.TAIL)
    opcodes[is_term] = np.where(found < 0, BloomOp.NONE, kinds)
    operands = np.zeros((*opcodes.shape, num_hashes), np.uint32)
    heads, tails = opcodes == BloomOp.HEAD, opcodes == BloomOp.TAIL
    operands[heads, 0] = head_rows[head_rows >= 0]
    operands[tails] = bloom_row_hashes(split_hashes(catalog.hashes_at(term_ids[tails])), num_hashes)
    return FilterPlan(
        opcodes, operands, term_ids, plan_of_query, CatalogToken(catalog.plan_token(found))
    )


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
    spans: Int32[_Array, "S 2"],
    values: Int32[_Array, "n"],
    segments: Int[_Array, "*shape"],
    wanted: Int[_Array, "*shape"],
    longest: int,
) -> Bool[Array, "*shape"]:
    """Whether segment s (ascending values from spans[s, 0] to spans[s, 1]) holds the value.

    Cost: log2(longest) gathers an element; `longest` bounds the length of a segment.
    """
    chosen = jnp.asarray(spans)[segments]
    low, end = chosen[..., 0], chosen[..., 1]
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
    term_spans: Int32[_Array, "N 2"],
    term_values: Int32[_Array, "S"],
    queries: Int32[_Array, "M"],
    items: Int32[_Array, "M"],
    longest: int,
) -> Bool[Array, "M"]:
    """Runs the program of queries[m] on the stored terms of items[m], exactly.

    The stack of a pair is the bits of one u32, its top bit 0; it starts as a single "yes", which is
    what an empty program leaves.
    """
    opcodes, term_ids = jnp.asarray(plan.opcodes).T, jnp.asarray(plan.term_ids).T
    if plan.plan_of_query is not None:
        queries = jnp.asarray(plan.plan_of_query)[queries]

    def step(stack, program_step):
        ops, terms = (values[queries] for values in program_step)
        held = contains(term_spans, term_values, items, terms, longest) | (ops == BloomOp.ALL)
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
