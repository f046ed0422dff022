"""Random Bloom indexes and programs, and the brute force they are held against."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from pallas_kernels.bloom import MAX_DEPTH, BloomOp, bloom_build, partition_width, row_hashes


@dataclass(frozen=True)
class Catalogue:
    """Items with one head value and a few tail terms each, and the index over them."""

    num_items: int
    num_head: int
    head_of_item: np.ndarray  # [N]; -1: none
    terms_of_item: np.ndarray  # bool[N, V]
    hashes_of_term: np.ndarray  # u32[V, K]
    rows: np.ndarray
    row_offsets: np.ndarray


def random_catalogue(
    rng: Generator,
    *,
    num_items: int,
    bundle_words: int,
    num_head: int = 3,
    num_terms: int = 6,
    num_hashes: int = 2,
    max_fpr: float = 0.2,
) -> Catalogue:
    """A catalogue whose first bundle has no tail terms at all, so that its width is 0."""
    head_of_item = rng.integers(-1, num_head, num_items) if num_head else np.full(num_items, -1)
    terms_of_item = rng.random((num_items, num_terms)) < 0.15
    terms_of_item[: bundle_words * 32] = False
    terms = rng.integers(0, 2**32, (num_terms, 2), dtype=np.uint32)
    bundle_of_item = np.arange(num_items) // (bundle_words * 32)
    num_bundles = -(-num_items // (bundle_words * 32))
    most_terms = np.zeros(num_bundles, np.int64)
    np.maximum.at(most_terms, bundle_of_item, terms_of_item.sum(1))
    tail_items, tail_terms = np.nonzero(terms_of_item)
    head_items = np.flatnonzero(head_of_item >= 0)
    rows, row_offsets = bloom_build(
        num_items,
        bundle_words=bundle_words,
        num_head=num_head,
        num_hashes=num_hashes,
        widths=np.array([partition_width(int(n), num_hashes, max_fpr) for n in most_terms], "i4"),
        head_items=head_items.astype(np.int32),
        head_rows=head_of_item[head_items].astype(np.int32),
        tail_items=tail_items.astype(np.int32),
        tail_terms=terms[tail_terms],
    )
    return Catalogue(
        num_items,
        num_head,
        head_of_item,
        terms_of_item,
        np.asarray(row_hashes(terms, num_hashes)),
        np.asarray(rows),
        np.asarray(row_offsets),
    )


def random_programs(
    rng: Generator, catalogue: Catalogue, *, num_queries: int, num_steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Valid programs: opcodes [Q, P], operands [Q, P, K], and the tail term meant by each step."""
    hashes = catalogue.hashes_of_term
    opcodes = np.zeros((num_queries, num_steps), np.int32)
    operands = rng.integers(0, 2**32, (num_queries, num_steps, hashes.shape[1]), dtype=np.uint32)
    terms = rng.integers(0, len(hashes), (num_queries, num_steps))
    for q in range(num_queries):
        opcodes[q] = _random_program(rng, num_steps, has_head=catalogue.num_head > 0)
    is_head, is_tail = opcodes == BloomOp.HEAD, opcodes == BloomOp.TAIL
    operands[is_tail] = hashes[terms[is_tail]]
    if catalogue.num_head:
        operands[is_head, 0] %= catalogue.num_head
    return opcodes, operands, terms


def _random_program(rng: Generator, num_steps: int, *, has_head: bool) -> list[int]:
    pushes = [BloomOp.TAIL, BloomOp.ALL, BloomOp.NONE, *([BloomOp.HEAD] * 3 if has_head else [])]
    program, depth = [], 0
    if rng.random() < 0.1:
        return [BloomOp.END] * num_steps
    while len(program) < num_steps:
        left = num_steps - len(program)
        choices = [BloomOp.END]
        if depth < MAX_DEPTH and depth + 1 <= left:
            choices += pushes
        if depth >= 1 and depth <= left:
            choices += [BloomOp.NOT]
        if depth >= 2:
            choices += [BloomOp.AND, BloomOp.OR] * 2
        if depth > left - 1 and depth >= 2:  # only just enough steps left to fold the stack
            choices = [BloomOp.AND, BloomOp.OR]
        op = choices[rng.integers(len(choices))]
        depth += {BloomOp.AND: -1, BloomOp.OR: -1}.get(op, 1 if op in pushes else 0)
        program.append(op)
    return program


def brute_force(
    catalogue: Catalogue, opcodes: np.ndarray, operands: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both masks as bool[Q, N], one item's bits at a time from the rows' definition."""
    bits = np.unpackbits(catalogue.rows.view(np.uint8), axis=1, bitorder="little").astype(bool)
    per_bundle = bits.shape[1]
    num_items, num_hashes = catalogue.num_items, operands.shape[2]
    items = np.arange(num_items)
    bundle, column = items // per_bundle, items % per_bundle
    first = catalogue.row_offsets[bundle]
    heights = catalogue.row_offsets[bundle + 1] - first
    widths = (heights - catalogue.num_head) // num_hashes
    out = []
    for program, arguments in zip(opcodes, operands, strict=True):
        stack = []
        for op, argument in zip(program, arguments, strict=True):
            if op == BloomOp.HEAD:
                hit = bits[first + argument[0], column]
                stack.append((hit, hit))
            elif op == BloomOp.TAIL:
                hit = widths > 0
                for i in np.flatnonzero(hit):
                    chosen = [
                        first[i]
                        + catalogue.num_head
                        + k * widths[i]
                        + int(argument[k]) % int(widths[i])
                        for k in range(num_hashes)
                    ]
                    hit[i] = bits[chosen, column[i]].all()
                stack.append((hit, np.zeros(num_items, bool)))
            elif op in (BloomOp.AND, BloomOp.OR):
                fold = np.logical_and if op == BloomOp.AND else np.logical_or
                (p1, s1), (p2, s2) = stack.pop(), stack.pop()
                stack.append((fold(p1, p2), fold(s1, s2)))
            elif op == BloomOp.NOT:
                p, s = stack.pop()
                stack.append((~s, ~p))
            elif op in (BloomOp.ALL, BloomOp.NONE):
                constant = np.full(num_items, op == BloomOp.ALL)
                stack.append((constant, constant))
        everything = np.ones(num_items, bool)
        out.append(stack[0] if stack else (everything, everything))
    return np.stack([p for p, _ in out]), np.stack([s for _, s in out])


def truth(
    catalogue: Catalogue, opcodes: np.ndarray, operands: np.ndarray, terms: np.ndarray
) -> np.ndarray:
    """What each program says about the items' real attributes: bool[Q, N]."""
    out = []
    for program, arguments, meant in zip(opcodes, operands, terms, strict=True):
        stack = []
        for op, argument, term in zip(program, arguments, meant, strict=True):
            if op == BloomOp.HEAD:
                stack.append(catalogue.head_of_item == argument[0])
            elif op == BloomOp.TAIL:
                stack.append(catalogue.terms_of_item[:, term])
            elif op == BloomOp.AND:
                stack.append(stack.pop() & stack.pop())
            elif op == BloomOp.OR:
                stack.append(stack.pop() | stack.pop())
            elif op == BloomOp.NOT:
                stack.append(~stack.pop())
            elif op in (BloomOp.ALL, BloomOp.NONE):
                stack.append(np.full(catalogue.num_items, op == BloomOp.ALL))
        out.append(stack[0] if stack else np.ones(catalogue.num_items, bool))
    return np.stack(out)


def unpack(masks) -> np.ndarray:
    """Bits of u32[Q, words] as bool[Q, 32 * words]."""
    packed = np.ascontiguousarray(masks).view(np.uint8)
    return np.unpackbits(packed, axis=1, bitorder="little").astype(bool)
