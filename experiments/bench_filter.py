"""Filters: the Bloom index beside an inverted index and a forward index, on this device's CPU.

    python -m experiments.bench_filter            # 100,000 and 1,000,000 items
    python -m experiments.bench_filter --quick    # 20,000 and 100,000 items: two minutes

Items have six features of ten values each, as in SilverTorch's measurements; filters have seven
conditions with AND, OR and NOT. Every method answers every filter, and the answers are compared
before anything is timed: the exact ones must agree, the Bloom mask must hold them. Also measured:
false positives against the formula, and masks of only the tiles that a search would probe. One JSON
file and its pictures go to experiments/results/bench_filter/.
"""

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import record, report
from jaxrec.retrieval import BloomIndex, F, spread_tiles
from jaxrec.retrieval.filters import Filter
from jaxrec.retrieval.masks import set_bits
from pallas_kernels._timing import Timing, time_interleaved

SEED = 0
NUM_FEATURES, VALUES_PER_FEATURE, VOCABULARY = 6, 10, 10_000
NUM_FILTERS = 16
CHUNK_ITEMS = 1 << 14  # of the forward index: one feature's values of a chunk fit the cache
RATES = (0.1, 0.03, 0.01, 0.003, 0.001)

type Terms = list[tuple[int, int]]


@dataclass(frozen=True)
class Clauses:
    """(any of first) AND (any of second) AND NOT (any of third), as (feature, value) terms."""

    first: Terms
    second: Terms
    third: Terms

    def tree(self) -> Filter:
        """The same as a filter of the library."""
        first, second, third = (
            functools.reduce(lambda a, b: a | b, [F(f"f{f}") == v for f, v in terms])
            for terms in (self.first, self.second, self.third)
        )
        return first & second & ~third


class InvertedIndex:
    """Sorted item numbers of each term; filters are merges of sorted lists, rarest lists first."""

    def __init__(self, columns: np.ndarray):
        num_features, num_items, per_item = columns.shape
        terms = columns + np.arange(num_features)[:, None, None] * VOCABULARY
        order = np.argsort(terms.reshape(-1), kind="stable")
        self.items = (order // per_item % num_items).astype(np.int32)
        counts = np.bincount(terms.reshape(-1), minlength=num_features * VOCABULARY)
        self.offsets = np.concatenate([[0], np.cumsum(counts)])

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.items.nbytes + self.offsets.nbytes

    def any_of(self, terms: Terms) -> np.ndarray:
        """Items with any of the terms, ascending."""
        lists = []
        for feature, value in terms:
            term = feature * VOCABULARY + value
            lists.append(self.items[self.offsets[term] : self.offsets[term + 1]])
        return np.unique(np.concatenate(lists))

    def search(self, clauses: Clauses) -> np.ndarray:
        """Item numbers, ascending."""
        short, long = sorted(map(self.any_of, (clauses.first, clauses.second)), key=len)
        kept = short[_held_in(long, short)]
        return kept[~_held_in(self.any_of(clauses.third), kept)]


class ForwardIndex:
    """The values of each item; filters look at every item, a chunk at a time."""

    def __init__(self, columns: np.ndarray):
        self.columns = np.ascontiguousarray(columns.astype(np.int32).transpose(0, 2, 1))

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.columns.nbytes

    def search(self, clauses: Clauses) -> np.ndarray:
        """Item numbers, ascending."""
        found = []
        for begin in range(0, self.columns.shape[2], CHUNK_ITEMS):
            chunk = self.columns[:, :, begin : begin + CHUNK_ITEMS]

            def any_of(terms: Terms, chunk=chunk) -> np.ndarray:
                hits = [(chunk[feature] == value).any(axis=0) for feature, value in terms]
                return np.logical_or.reduce(hits)

            passes = any_of(clauses.first)
            if passes.any():  # the usual short cut
                passes &= any_of(clauses.second) & ~any_of(clauses.third)
            found.append(np.flatnonzero(passes) + begin)
        return np.concatenate(found)


def _held_in(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether each wanted number is among the ascending values."""
    if not len(values):
        return np.zeros(len(wanted), bool)
    return values[np.minimum(np.searchsorted(values, wanted), len(values) - 1)] == wanted


def main() -> None:
    """Runs the benchmark from the command line."""
    options, began = _options(), time.monotonic()
    measurements: list[dict[str, Any]] = []
    for num_items in options.sizes:
        columns = random_columns(num_items)
        measurements += measure_filters(columns, options.repeats)
        if num_items == options.sizes[0]:
            measurements += measure_false_positives(columns)
    path = record.write(
        "bench_filter",
        config={
            "sizes": options.sizes, "features": NUM_FEATURES, "vocabulary": VOCABULARY,
            "values_per_feature": VALUES_PER_FEATURE, "filters": NUM_FILTERS, "conditions": 7,
            "num_hashes": 5,
        },
        measurements=measurements,
        checks={"answers_that_differ": 0, "eligible_items_lost": 0},
        seeds=[SEED],
        published=["Bloom 291-523x an inverted index, 12.6-42.7x a forward index: GPU, 40 M items, "
                   "5 hashes (SilverTorch, arXiv 2511.14881)"],
        wall_s=time.monotonic() - began,
        scratch=options.scratch,
    )  # fmt: skip
    path.with_suffix(".times.png").write_bytes(times_plot(measurements))
    path.with_suffix(".fpr.png").write_bytes(fpr_plot(measurements))
    print(f"wrote {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares ways to filter items.")
    parser.add_argument("--quick", action="store_true", help="smaller catalogues")
    parser.add_argument("--sizes", type=int, nargs="+", help="items of each catalogue")
    parser.add_argument("--repeats", type=int, default=7, help="samples of each variant")
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    options = parser.parse_args()
    options.sizes = options.sizes or ([20_000, 100_000] if options.quick else [100_000, 1_000_000])
    return options


def random_columns(num_items: int) -> np.ndarray:
    """Values i32[features, items, values an item]: a few common ones and a long tail."""
    rng = np.random.default_rng(SEED)
    shape = (NUM_FEATURES, num_items, VALUES_PER_FEATURE)
    return (VOCABULARY * rng.random(shape, np.float32) ** 3).astype(np.int32)


def random_clauses() -> list[Clauses]:
    """Filters of seven conditions over values of all frequencies."""
    rng = np.random.default_rng(SEED + 1)

    def terms(features):
        return [(f, int(VOCABULARY * rng.random() ** 3)) for f in features]

    return [Clauses(terms([0, 0, 1]), terms([2, 3]), terms([4, 5])) for _ in range(NUM_FILTERS)]


def measure_filters(columns: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """Time of all filters, bytes of the indexes, and time of tiles only."""
    num_items = columns.shape[1]
    clauses = random_clauses()
    index, build_s = _timed(lambda: build_bloom(columns))
    inverted, inverted_s = _timed(lambda: InvertedIndex(columns))
    forward, forward_s = _timed(lambda: ForwardIndex(columns))
    plan = index.compile([c.tree() for c in clauses])
    possibly = jax.jit(lambda index, plan: index.masks(plan).possibly)
    _check_answers(index, plan, inverted, forward, clauses)
    variants: dict[str, Callable[[], Any]] = {
        "bloom mask": lambda: possibly(index, plan),
        "bloom, verified": lambda: index.search(plan, exact=True),
        "inverted index": lambda: [inverted.search(c) for c in clauses],
        "forward index": lambda: [forward.search(c) for c in clauses],
    }
    timings = time_interleaved(variants, repeats=repeats)
    rows = np.asarray(index.rows).nbytes
    terms = np.asarray(index.term_values).nbytes + np.asarray(index.term_spans).nbytes
    sizes = {
        "bloom mask": (rows, build_s), "bloom, verified": (rows + terms, build_s),
        "inverted index": (inverted.nbytes, inverted_s),
        "forward index": (forward.nbytes, forward_s),
    }  # fmt: skip
    measurements = []
    print(f"{num_items} items: {'method':16} {'us/filter':>10} {'bytes/item':>11} {'build s':>8}")
    for name, timing in timings.items():
        nbytes, seconds = sizes[name]
        common = {"workload": f"{num_items} items", "backend": name, "num_items": num_items}
        measurements += [
            common | _timing("time_per_filter", timing, NUM_FILTERS),
            common | {"metric": "index_bytes", "unit": "bytes/item", "value": nbytes / num_items},
            common | {"metric": "build", "unit": "s", "value": seconds},
        ]
        print(f"{'':>{len(str(num_items)) + 8}}{name:16} {timing.p50_us / NUM_FILTERS:10.1f} "
              f"{nbytes / num_items:11.1f} {seconds:8.2f}")  # fmt: skip
    return measurements + measure_tiles(index, plan, repeats)


def _timed(build: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return build(), time.perf_counter() - began


def build_bloom(columns: np.ndarray, max_fpr: float = 1e-3) -> BloomIndex:
    """The library's index of the columns."""
    index = BloomIndex.build({f"f{f}": c for f, c in enumerate(columns)}, max_fpr=max_fpr)
    return jax.block_until_ready(index)


def _check_answers(index, plan, inverted, forward, clauses) -> None:
    exact = np.asarray(index.search(plan, exact=True))
    lost = (exact & ~np.asarray(index.search(plan))).any()
    queries, items = set_bits(exact)
    for query, clause in enumerate(clauses):
        want = forward.search(clause)
        for found in (inverted.search(clause), items[queries == query]):
            if lost or not np.array_equal(found, want):
                raise SystemExit(f"filter {query} is answered differently; nothing is recorded")


def measure_tiles(index: BloomIndex, plan, repeats: int) -> list[dict[str, Any]]:
    """Masks of the 64-item tiles of some probed lists, alone and spread, beside whole masks."""
    rng = np.random.default_rng(SEED + 2)
    num_tiles, list_tiles = index.live.shape[0] // 2, 16
    everywhere = jax.jit(lambda index, plan: index.masks(plan).possibly)
    tiles_of = jax.jit(lambda index, plan, tiles: index.masks(plan, tiles).possibly)

    @jax.jit
    def spread_of(index, plan, tiles):
        return spread_tiles(index.masks(plan, tiles).possibly, tiles, index.live.shape[0])

    variants = {"all": functools.partial(everywhere, index, plan)}

    for percent in (1, 3, 10):
        lists = max(1, num_tiles * percent // 100 // list_tiles)
        starts = np.stack([rng.permutation(num_tiles // list_tiles)[:lists]
                           for _ in range(NUM_FILTERS)])  # fmt: skip
        tiles = (starts[..., None] * list_tiles + np.arange(list_tiles)).astype(np.int32)
        tiles = jnp.asarray(tiles.reshape(NUM_FILTERS, -1))
        variants[f"{percent} % of tiles"] = functools.partial(tiles_of, index, plan, tiles)
        variants[f"{percent} %, spread"] = functools.partial(spread_of, index, plan, tiles)
    timings = time_interleaved(variants, repeats=repeats)
    for name, timing in timings.items():
        print(f"  tiles: {name:16} {timing.p50_us / NUM_FILTERS:10.1f} us/filter")
    common = {"workload": f"{index.num_items} items", "num_items": index.num_items}
    return [
        common | {"backend": name} | _timing("probed_tiles_time", timing, NUM_FILTERS)
        for name, timing in timings.items()
    ]


def measure_false_positives(columns: np.ndarray) -> list[dict[str, Any]]:
    """False positive rates of tail terms against the formula's, for several `max_fpr`."""
    rng = np.random.default_rng(SEED + 3)
    measurements = []
    for rate in RATES:
        index = build_bloom(columns, max_fpr=rate)
        values = rng.integers(VOCABULARY // 2, VOCABULARY, 200)
        plan = index.compile([F("f0") == int(v) for v in values])
        tail = np.flatnonzero((plan.opcodes == 2).any(axis=1))
        found = np.bitwise_count(np.asarray(index.search(plan))).sum(axis=1)[tail]
        held = np.bitwise_count(np.asarray(index.search(plan, exact=True))).sum(axis=1)[tail]
        lacking = columns.shape[1] - held
        measured = float((found - held).sum() / lacking.sum())
        expected = expected_rate(index)
        for name, value in (("measured", measured), ("formula", expected)):
            measurements.append({
                "metric": "false_positive_rate", "unit": "1", "backend": name,
                "workload": f"max_fpr {rate}", "max_fpr": rate, "value": value,
            })  # fmt: skip
        print(f"max_fpr {rate}: measured {measured:.5f}, formula {expected:.5f}, "
              f"{np.asarray(index.rows).nbytes / columns.shape[1]:.0f} bytes an item")  # fmt: skip
        if not measured <= 1.2 * rate:
            raise SystemExit(f"the rate {measured} is above max_fpr {rate}; nothing is recorded")
    return measurements


def expected_rate(index: BloomIndex) -> float:
    """The formula's mean over the items: (1 - (1 - 1/w)^n)^K of n tail terms in width w."""
    head = index.catalog.head_rows >= 0
    spans, terms = np.asarray(index.term_spans), np.asarray(index.term_values)
    before = np.concatenate([[0], np.cumsum(~head[terms])])
    counts = before[spans[:, 1]] - before[spans[:, 0]]
    heights = np.diff(np.asarray(index.row_offsets)) - index.num_head
    bundles = np.arange(len(spans)) // (index.rows.shape[1] * 32)
    widths = (heights // index.num_hashes)[bundles]
    return float(np.mean((1 - (1 - 1 / widths) ** counts) ** index.num_hashes))


def _timing(metric: str, timing: Timing, calls: int) -> dict[str, Any]:
    return {
        "metric": metric, "unit": "us", "samples": [s / calls for s in timing.samples_us],
        "p20": timing.p20_us / calls, "p50": timing.p50_us / calls, "p80": timing.p80_us / calls,
    }  # fmt: skip


def times_plot(measurements: list[dict[str, Any]]) -> bytes:
    """Time a filter over the size of the catalogue, a line a method."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for m in measurements:
        if m["metric"] == "time_per_filter":
            xs, ys = series.setdefault(m["backend"], ([], []))
            xs.append(m["num_items"])
            ys.append(m["p50"])
    return report.plot(series, x="items", y="µs a filter (median)", log_x=True, log_y=True)


def fpr_plot(measurements: list[dict[str, Any]]) -> bytes:
    """False positive rate as a part of what was asked for."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for m in measurements:
        if m["metric"] == "false_positive_rate":
            xs, ys = series.setdefault(m["backend"], ([], []))
            xs.append(m["max_fpr"])
            ys.append(m["value"] / m["max_fpr"])
    return report.plot(
        series, x="max_fpr", y="rate of tail terms / max_fpr", log_x=True, bottom=0,
        lines={"asked for": 1.0},
    )  # fmt: skip


if __name__ == "__main__":
    main()
