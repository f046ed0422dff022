"""Rewriting items gives the rows that building them gives."""

import numpy as np
import pytest

from pallas_kernels.bloom import bloom_build, bloom_update
from pallas_kernels.bloom import update as update_module

LAYOUT = {"num_head": 3, "num_hashes": 2}
NUM_ITEMS, BUNDLE_WORDS = 150, 2
WIDTHS = np.array([5, 1, 9], np.int32)


def random_pairs(rng, items):
    head, tail = rng.choice(items, 2 * len(items)), rng.choice(items, 4 * len(items))
    return {
        "head_items": head.astype(np.int32),
        "head_rows": rng.integers(0, 3, len(head)).astype(np.int32),
        "tail_items": tail.astype(np.int32),
        "tail_terms": rng.integers(0, 2**32, (len(tail), 2), dtype=np.uint32),
    }


def build(pairs):
    return bloom_build(NUM_ITEMS, bundle_words=BUNDLE_WORDS, widths=WIDTHS, **LAYOUT, **pairs)


def joined(old, new, positions):
    """The pairs after an update; repeated ones do no harm."""
    out = {}
    for kind in ("head", "tail"):
        kept = ~np.isin(old[f"{kind}_items"], positions)
        for name in (n for n in old if n.startswith(kind)):
            out[name] = np.concatenate([old[name][kept], new[name]])
    return out


@pytest.mark.parametrize("chunk_cells", [1 << 24, 20])
@pytest.mark.parametrize("donate", [False, True])
def test_equals_a_build(chunk_cells, donate, monkeypatch):
    monkeypatch.setattr(update_module, "_CHUNK_CELLS", chunk_cells)
    rng = np.random.default_rng(0)
    pairs = random_pairs(rng, np.arange(NUM_ITEMS))
    rows, offsets = build(pairs)
    before = np.array(rows)
    for count in (0, 1, 40, NUM_ITEMS):
        positions = rng.choice(NUM_ITEMS, count, replace=False).astype(np.int32)
        new = random_pairs(rng, positions if count else np.arange(0))
        pairs = joined(pairs, new, positions)
        old = rows
        rows = bloom_update(rows, offsets, positions, **LAYOUT, **new, donate=donate)
        np.testing.assert_array_equal(rows, build(pairs)[0])
        if not donate and count == 1:
            np.testing.assert_array_equal(old, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": np.array([192], np.int32)}, r"positions\[0\] is 192; expected 0 to 191"),
        ({"positions": np.array([3, 3], np.int32)}, "position 3 is given more than once"),
        ({"head_items": np.array([4], np.int32)}, r"head_items\[0\] is 4, .* not among positions"),
        ({"head_rows": np.array([3], np.int32)}, r"head_rows\[0\] is 3; expected .* 0 to 2"),
        ({"offsets": np.array([0, 3, 5, 23], np.int32)}, "bundle 0 has width 0"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "positions": np.array([3], np.int32),
        "head_items": np.array([3], np.int32),
        "head_rows": np.array([0], np.int32),
        "tail_items": np.array([3], np.int32),
        "tail_terms": np.array([[1, 2]], np.uint32),
    } | change
    offsets = arguments.pop("offsets", np.array([0, 13, 18, 39], np.int32))
    rows = np.zeros((39, BUNDLE_WORDS), np.uint32)
    with pytest.raises(ValueError, match=message):
        bloom_update(rows, offsets, **LAYOUT, **arguments)
