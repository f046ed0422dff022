"""Attribute values as terms: hashing, and the catalogue that a filter's terms are looked up in.

A term is a (feature, value) pair. All of this runs on the host, in NumPy's uint64.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt32, UInt64

from jaxrec.retrieval.filters import FilterError, value_text
from pallas_kernels import mix64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SEPARATOR = "\0"


def hash_texts(texts: Sequence[str], seed: int) -> UInt64[np.ndarray, "n"]:
    """64 bits a text: a sum of one random-looking number for each (position, byte).

    A sum needs no loop over positions, so texts of any lengths are hashed at once.
    """
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64)
    ends = np.cumsum(lengths)
    data = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint64)
    position = (np.arange(len(data)) - np.repeat(ends - lengths, lengths)).astype(np.uint64)
    start = mix64(np.array([seed], np.uint64) * _GOLDEN + _GOLDEN)
    parts = mix64(((position << np.uint64(8)) | data) * _GOLDEN + start)
    totals = np.concatenate([np.zeros(1, np.uint64), np.cumsum(parts, dtype=np.uint64)])
    sums = totals[ends] - totals[ends - lengths]
    return mix64(sums + lengths.astype(np.uint64) * _GOLDEN + start)


def split_hashes(hashes: UInt64[np.ndarray, "n"]) -> UInt32[np.ndarray, "n 2"]:
    """64-bit numbers as the (low, high) pairs of 32 bits that the device works on."""
    return np.ascontiguousarray(hashes).view("<u4").reshape(-1, 2)


class TermCatalog:
    """The terms of a catalogue, numbered from 0. It only grows, and no number ever changes.

    Indexes of one catalogue share this object, and so understand the same plans. Compared by
    identity: it is static to `jax.jit`, so a growing catalogue compiles nothing anew. One thread
    at a time may add terms; others may look terms up meanwhile.

    Attributes:
      features: names, sorted.
      seed: of the hash; chosen so that no two terms of the build collide.
      fingerprint: of the terms that the catalogue was made with; equal content, equal number.
    """

    def __init__(
        self,
        features: tuple[str, ...],
        seed: int,
        hashes: UInt64[np.ndarray, "V"],
        head_rows: Int32[np.ndarray, "V"],
    ):
        """A catalogue of V terms: the hash and the exact Bloom row (-1 for none) of each."""
        self.features, self.seed = features, seed
        self._hashes, self._head_rows = hashes, head_rows
        self._order = np.argsort(hashes, kind="stable").astype(np.int32)
        self._sorted = hashes[self._order]
        self._added: dict[int, int] = {}
        self._added_hashes: list[int] = []
        names = hash_texts(["\1".join(features)], seed)[0]
        rows = np.arange(len(hashes), dtype=np.uint64) << np.uint64(32)
        rows |= head_rows.astype(np.uint32)
        self.fingerprint = int(names ^ np.sum(mix64(hashes ^ mix64(rows)), dtype=np.uint64))
        self._lineage = secrets.randbits(64)

    def __len__(self) -> int:
        return len(self._hashes) + len(self._added_hashes)

    def __copy__(self) -> "TermCatalog":
        return self

    def __deepcopy__(self, memo: Any) -> "TermCatalog":
        # Two copies that grew apart would give one number to different terms.
        return self

    def __reduce__(self):
        return TermCatalog, (self.features, self.seed, self.hashes, self.head_rows)

    @property
    def hashes(self) -> UInt64[np.ndarray, "V"]:
        """The 64-bit hash of each term."""
        return np.concatenate([self._hashes, np.array(self._added_hashes, np.uint64)])

    @property
    def head_rows(self) -> Int32[np.ndarray, "V"]:
        """The exact Bloom row of each term, -1 for terms of the tail."""
        return np.pad(self._head_rows, (0, len(self) - len(self._head_rows)), constant_values=-1)

    def with_head(self, head: Int[np.ndarray, "h"]) -> "TermCatalog":
        """The catalogue in which these terms have exact rows."""
        head_rows = np.full(len(self._hashes), -1, np.int32)
        head_rows[head] = np.arange(len(head))
        return TermCatalog(self.features, self.seed, self._hashes, head_rows)

    def hashes_of(self, terms: Sequence[tuple[str, str]]) -> UInt64[np.ndarray, "n"]:
        """The hashes of (feature, value) pairs, known or not."""
        return hash_texts([feature + _SEPARATOR + value for feature, value in terms], self.seed)

    def numbers_of(self, hashes: UInt64[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
        """Numbers of the terms with these hashes; -1 for those that no item has.

        An unknown term is taken for a known one with probability V / 2^64.
        """
        numbers = np.full(len(hashes), -1, np.int32)
        if len(self._sorted):
            places = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
            numbers = np.where(self._sorted[places] == hashes, self._order[places], numbers)
        if self._added:
            for i in np.flatnonzero(numbers < 0):
                numbers[i] = self._added.get(int(hashes[i]), -1)
        return numbers

    def hashes_at(self, numbers: Int[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
        """The hashes of the terms with these numbers."""
        late = np.flatnonzero(numbers >= len(self._hashes))
        if not len(late):
            return self._hashes[numbers]
        hashes = np.zeros(len(numbers), np.uint64)
        early = numbers < len(self._hashes)
        hashes[early] = self._hashes[numbers[early]]
        hashes[late] = [self._added_hashes[n - len(self._hashes)] for n in numbers[late]]
        return hashes

    def head_rows_of(self, numbers: Int[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
        """The exact Bloom row of each of these terms, -1 for terms of the tail or number -1."""
        early = (numbers >= 0) & (numbers < len(self._head_rows))
        rows = np.full(len(numbers), -1, np.int32)
        rows[early] = self._head_rows[numbers[early]]
        return rows

    def add(self, hashes: UInt64[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
        """Numbers of these terms; unknown ones join the tail under the next free numbers."""
        numbers = self.numbers_of(hashes)
        for i in np.flatnonzero(numbers < 0):
            value = int(hashes[i])
            if value not in self._added:
                self._added_hashes.append(value)
                self._added[value] = len(self) - 1
            numbers[i] = self._added[value]
        return numbers

    def plan_token(self, numbers: Int[np.ndarray, "n"]) -> int:
        """What marks a plan of these terms as made for this catalogue; see `accepts`.

        Plans of terms from the build are understood by every catalogue made with the same terms,
        plans of later terms by this one only.
        """
        late = bool((numbers >= len(self._hashes)).any())
        return self._lineage if late else self.fingerprint

    def accepts(self, token: int) -> bool:
        """Whether a plan with this token names terms by this catalogue's numbers."""
        return token in (self.fingerprint, self._lineage)


@dataclass(frozen=True)
class ItemTerms:
    """Which item has which term: pairs without repeats, ordered by item and then by term.

    Attributes:
      num_items: N.
      items, terms: item number and term number of each pair; i32[n].
    """

    num_items: int
    items: Int32[np.ndarray, "n"]
    terms: Int32[np.ndarray, "n"]


def collect_terms(features: Mapping[str, Any]) -> tuple[ItemTerms, TermCatalog]:
    """The pairs of a catalogue and its terms; every term is still in the tail.

    Args:
      features: for each name one entry an item: a value, a list of values, or None for no value.

    Raises:
      FilterError: features of different lengths (naming both), a value that is neither string nor
        integer (naming feature and item), or an unusable name.
    """
    num_items, items, texts, ranks = _encode(features)
    seed, hashes = _collision_free(texts)
    order = np.argsort(hashes)
    number = np.empty(len(texts), np.int64)
    number[order] = np.arange(len(texts))
    catalog = TermCatalog(
        tuple(sorted(features)), seed, hashes[order], np.full(len(texts), -1, np.int32)
    )
    return _distinct_pairs(num_items, items, number[ranks], len(texts)), catalog


def number_terms(features: Mapping[str, Any], catalog: TermCatalog, *, num_items: int) -> ItemTerms:
    """The pairs of further items of a catalogue, which learns the values that are new to it.

    Raises:
      FilterError: as `collect_terms`, and for features that are missing or unknown, or for another
        number of entries than `num_items`; nothing is learnt then.
    """
    if set(features) != set(catalog.features):
        raise FilterError(
            f"the items have the features {', '.join(sorted(features)) or 'none'}; expected "
            f"{', '.join(catalog.features)}, with None for an item without a value"
        )
    entries, items, texts, ranks = _encode(features)
    if entries != num_items:
        raise FilterError(f"the features have {entries} entries for {num_items} items")
    numbers = catalog.add(hash_texts(texts, catalog.seed)).astype(np.int64)
    return _distinct_pairs(num_items, items, numbers[ranks], len(catalog))


def _encode(features: Mapping[str, Any]):
    """(items, item of each pair, distinct terms as text, text number of each pair)."""
    if not features:
        raise FilterError("features is empty; expected {name: one entry an item}")
    lengths = {name: len(column) for name, column in features.items()}
    num_items = next(iter(lengths.values()))
    texts: list[str] = []
    items, ranks = [], []
    for name, column in features.items():
        if lengths[name] != num_items:
            raise FilterError(
                f"feature {name!r} has {lengths[name]} entries and {next(iter(lengths))!r} has "
                f"{num_items}; expected one entry an item in each"
            )
        if not name or _SEPARATOR in name:
            raise FilterError(f"{name!r} cannot be the name of a feature")
        column_items, values, column_ranks = _column(name, column)
        items.append(column_items)
        ranks.append(column_ranks + len(texts))
        texts.extend(name + _SEPARATOR + value for value in values)
    return num_items, np.concatenate(items), texts, np.concatenate(ranks)


def _distinct_pairs(num_items: int, items, terms, num_terms: int) -> ItemTerms:
    # np.unique hashes integers, which takes ten times as long as sorting these.
    pairs = np.sort(items * max(num_terms, 1) + terms)
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    owners, terms = np.divmod(pairs, max(num_terms, 1))
    return ItemTerms(num_items, owners.astype(np.int32), terms.astype(np.int32))


def _collision_free(texts: list[str]) -> tuple[int, UInt64[np.ndarray, "n"]]:
    """A seed under which all texts have hashes of their own; the first nearly always will do."""
    for seed in range(16):
        hashes = hash_texts(texts, seed)
        ordered = np.sort(hashes)
        if (ordered[1:] != ordered[:-1]).all():
            return seed, hashes
    raise FilterError("16 hash functions in a row collide on the catalogue's values")


def _column(name: str, column: Any) -> tuple[Int[np.ndarray, "n"], list[str], Int[np.ndarray, "n"]]:
    """(item of each pair, distinct values as text, value number of each pair) of one feature."""
    if hasattr(column, "__array__"):  # NumPy, JAX or a data frame's column
        column = np.asarray(column)
    if isinstance(column, np.ndarray) and column.ndim in (1, 2) and column.dtype.kind in "iubU":
        values, inverse = np.unique(column, return_inverse=True)
        items = np.repeat(np.arange(len(column)), column.size // max(len(column), 1))
        return items, [value_text(value) for value in values], inverse.ravel()
    owners: list[int] = []
    ranks: list[int] = []
    numbers: dict[str, int] = {}
    rank_of: dict[tuple[type, Any], int] = {}  # 1 and True are equal, and not the same value
    for item, entry in enumerate(column):
        for value in _entry_values(entry):
            rank = rank_of.get((type(value), value)) if isinstance(value, str | int) else None
            if rank is None:
                try:
                    text = value_text(value)
                except FilterError as error:
                    raise FilterError(f"feature {name!r} of item {item}: {error}") from None
                rank = rank_of[type(value), value] = numbers.setdefault(text, len(numbers))
            owners.append(item)
            ranks.append(rank)
    return np.array(owners, np.int64), list(numbers), np.array(ranks, np.int64)


def _entry_values(entry: Any) -> Sequence[Any]:
    if entry is None:
        return ()
    if isinstance(entry, np.ndarray):
        return tuple(entry.ravel())
    if isinstance(entry, list | tuple):
        return entry
    if isinstance(entry, set | frozenset):
        return tuple(entry)
    return (entry,)
