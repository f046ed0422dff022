"""Times updates of a live index and measures what drift costs in recall.

    python -m experiments.fresh_updates                     # two CPU cores: a few minutes

Items arrive around other topics than those of the build. After each batch: the time of an upsert
and of a filtered search, the drift, and recall at the built nprobe; then after a compaction with
the old lists and after one with new lists. One JSON file goes to
experiments/results/fresh_updates/.
"""

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from experiments import record
from jaxrec.retrieval import ItemIndex, LiveIndex, recall

METRIC_UNITS = {"upsert": "ms", "search": "ms", "compact": "s", "spread": "1", "recall": "1"}


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment."""

    num_items: int = 20_000
    width: int = 32
    capacity: int = 8_192
    arriving: int = 8_000
    update_size: int = 200
    num_topics: int = 100
    num_queries: int = 64
    k: int = 50
    seed: int = 0


def main() -> None:
    """Runs the experiment from the command line."""
    parser = argparse.ArgumentParser(description="Updates of a live index.")
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    options, settings = parser.parse_args(), Settings()
    began, rng = time.perf_counter(), np.random.default_rng(settings.seed)
    topics = rng.normal(size=(2, settings.num_topics, settings.width)) * 2
    index = _built(rng, topics[0], settings)
    queries = _around(rng, topics.reshape(-1, settings.width), settings.num_queries)
    measurements = _state("built", index, queries, settings)
    upserts = []
    for begin in range(0, settings.arriving, settings.update_size):
        ids = np.arange(begin, begin + settings.update_size) + settings.num_items
        vectors = _around(rng, topics[1], len(ids))
        features = _features(rng, len(ids))
        seconds, index = _timed(functools.partial(index.upsert, ids, vectors, features))
        upserts.append(seconds * 1e3)
    measurements.append(_measurement("upsert", "stream", upserts[1:]))  # the first compiles
    measurements += _state("all fresh", index, queries, settings)
    for name, recluster in (("old lists", False), ("new lists", True)):
        compact = functools.partial(index.compact, key=jax.random.key(1), recluster=recluster)
        seconds, compacted = _timed(compact)
        measurements.append(_measurement("compact", name, [seconds]))
        measurements += _state(name, compacted, queries, settings)
    path = record.write(
        "fresh_updates", config=asdict(settings), measurements=measurements,
        seeds=[settings.seed], wall_s=time.perf_counter() - began, scratch=options.scratch,
    )  # fmt: skip
    print(f"wrote {path}")


def _around(rng: np.random.Generator, topics: np.ndarray, count: int) -> np.ndarray:
    chosen = topics[rng.integers(0, len(topics), count)]
    return (chosen + rng.normal(size=chosen.shape)).astype(np.float32)


def _features(rng: np.random.Generator, count: int) -> dict[str, Any]:
    return {
        "language": rng.integers(0, 10, count),
        "creator": rng.integers(0, 1_000, count),
    }


def _built(rng: np.random.Generator, topics: np.ndarray, settings: Settings) -> LiveIndex:
    vectors = _around(rng, topics, settings.num_items)
    main_part = ItemIndex.build(
        vectors, _features(rng, len(vectors)), key=jax.random.key(0),
        sample_queries=_around(rng, topics, 256),
    )  # fmt: skip
    return LiveIndex.build(main_part, capacity=settings.capacity)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def _state(
    name: str, index: LiveIndex, queries: np.ndarray, settings: Settings
) -> list[dict[str, Any]]:
    """Search time, recall at the index's nprobe and drift."""
    plan = index.compile(["NOT language:3"] * len(queries))
    exact = index.search(queries, plan, k=settings.k, exact=True)
    samples = [_timed(lambda: index.search(queries, plan, k=settings.k)) for _ in range(6)]
    found = recall(np.asarray(samples[-1][1].ids), np.asarray(exact.ids))
    drift = index.drift()
    print(f"{name:10} nprobe {index.main.nprobe:3d} recall {found:.3f} {drift}")
    return [
        _measurement("search", name, [seconds * 1e3 for seconds, _ in samples[1:]]),
        _measurement("recall", name, [found]) | {"nprobe": index.main.nprobe},
        _measurement("spread", name, [drift.spread]) | drift._asdict(),
    ]


def _measurement(metric: str, state: str, samples: list[float]) -> dict[str, Any]:
    return {
        "metric": metric,
        "unit": METRIC_UNITS[metric],
        "state": state,
        "samples": samples,
        "p50": float(np.median(samples)),
    }


if __name__ == "__main__":
    main()
