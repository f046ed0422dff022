"""Times filtered search beside faiss, usearch and ScaNN: recall@k against queries a second.

    python -m experiments.bench_retrieval            # 200,000 items, 64 wide, 512 lists, k = 100
    python -m experiments.bench_retrieval --quick    # 20,000 items

A batch of queries shares one filter, which is what faiss can search at once (an `IDSelectorBitmap`,
made beforehand); ours compiles the filter beforehand too. One more case gives each query a filter
of its own. Variants take turns. Peers sweep what they probe; ours is asked once, as its planner
chooses. One JSON file and a plot go to experiments/results/bench_retrieval/.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import record
from experiments.peers import Peers, Variant
from experiments.readme import beside_peers
from jaxrec.retrieval import ItemIndex, Strategy, brute_force, recall

SEED, WIDTH, K = 0, 64, 100
SELECTIVITIES = (0.001, 0.01, 0.1, 0.5, 1.0)
KINDS = ("random", "near")
GROUPS = 100  # of one per cent of the items each, for filters of each query's own
OWN = "own filters"
_REST_S = 0.02  # before each sample: threads of the library before spin for a while


def main() -> None:
    """Runs the benchmark from the command line."""
    options = _options()
    rows, queries, tuning = _embeddings(options.items, options.batch)
    filters = _filters(rows)
    groups = np.random.default_rng(SEED + 2).integers(0, GROUPS, (2, len(rows)))
    asked = groups[1, : len(queries)]
    features = {name: passes.astype(int).tolist() for name, passes in filters.items()}
    index = ItemIndex.build(
        rows, features | {"group": groups[0].tolist()}, key=jax.random.key(SEED),
        nlist=options.lists, sample_queries=tuning,
    )  # fmt: skip
    peers = Peers(rows, options.lists, options.threads, K)
    for missing in peers.missing:
        print(f"not measured, {missing}")
    measurements: list[dict[str, Any]] = []
    for name, passes in filters.items():
        truth = brute_force(queries, rows, np.flatnonzero(passes), k=K)
        variants = _ours(index, queries, [f"{name}:1"]) | peers.variants(queries, passes)
        measurements += _measure(name, variants, truth, options)
    passes = groups[0] == asked[:, None]
    truth = np.concatenate([
        brute_force(query[None], rows, np.flatnonzero(own), k=K)
        for query, own in zip(queries, passes, strict=True)
    ])  # fmt: skip
    ours = _ours(index, queries, [f"group:{group}" for group in asked])
    measurements += _measure(OWN, ours | peers.own_filter_variants(queries, passes), truth, options)
    path = record.write(
        "bench_retrieval",
        config=vars(options) | {"width": WIDTH, "k": K, "nprobe": index.nprobe,
                                "missing": peers.missing},
        measurements=measurements,
        seeds=[SEED],
        scratch=options.scratch,
    )  # fmt: skip
    for row in beside_peers(measurements):
        print(row)
    print(f"wrote {path}")
    _plot(measurements, path.with_suffix(".png"))


def _measure(name: str, variants: dict[str, Variant], truth, options) -> list[dict[str, Any]]:
    samples, measured = _interleaved(variants, options.repeats), []
    for variant, seconds in samples.items():
        ids, note = variants[variant]()
        row = {
            "metric": "queries a second",
            "unit": "1/s",
            "filter": name,
            "variant": variant,
            "recall": recall(ids, truth),
            "samples": [len(truth) / s for s in seconds],
            "value": len(truth) / float(np.median(seconds)),
            "note": note,
        }
        measured.append(row)
        print(f"{name:14} {variant:16} {row['value']:9.0f} q/s "
              f"recall {row['recall']:.4f} {note}", flush=True)  # fmt: skip
    return measured


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times filtered search beside faiss, usearch, ScaNN."
    )
    parser.add_argument("--quick", action="store_true", help="20,000 items in 128 lists")
    parser.add_argument("--batch", type=int, default=256, help="queries of a call")
    parser.add_argument("--threads", type=int, default=2, help="of faiss; pin cores for ours")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each variant")
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    options = parser.parse_args()
    options.items, options.lists = (20_000, 128) if options.quick else (200_000, 512)
    return options


def _embeddings(num_items: int, num_queries: int):
    """Items, queries and tuning queries: clusters, unequal directions and lengths."""
    rng = np.random.default_rng(SEED)
    centres = rng.normal(size=(num_items // 100, WIDTH))
    spectrum = np.arange(1, WIDTH + 1) ** -0.3

    def draw(count: int) -> np.ndarray:
        x = centres[rng.integers(0, len(centres), count)] + 0.7 * rng.normal(size=(count, WIDTH))
        return x * spectrum

    lengths = np.exp(0.25 * rng.normal(size=(num_items, 1)))
    return ((draw(num_items) * lengths).astype(np.float32),
            draw(num_queries).astype(np.float32), draw(256).astype(np.float32))  # fmt: skip


def _filters(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Items that pass, by name: drawn at random, or the farthest along a direction."""
    rng = np.random.default_rng(SEED + 1)
    along = rows @ rng.normal(size=WIDTH)
    passing = {}
    for share in SELECTIVITIES:
        passing[f"random_{share:g}"] = rng.random(len(rows)) < share
        if share < 1:
            passing[f"near_{share:g}"] = along >= np.quantile(along, 1 - share)
    return passing


def _ours(index: ItemIndex, queries: np.ndarray, filters: list[str]) -> dict[str, Variant]:
    """A search with one filter for all queries, or one for each."""
    plan, asked = index.compile(filters), jnp.asarray(queries).reshape(len(filters), -1, WIDTH)
    strategy = Strategy(int(index.plan_of(asked, plan, k=K).strategy[0])).name

    def search() -> tuple[np.ndarray, str]:
        return np.asarray(_search(index, asked, plan).ids).reshape(len(queries), K), strategy

    return {"jaxrec": search}


@functools.partial(jax.jit)
def _search(index, queries, plan):
    return index.search(queries, plan, k=K)


def _interleaved(variants: dict[str, Variant], repeats: int) -> dict[str, list[float]]:
    for call in variants.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            time.sleep(_REST_S)
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return samples


STYLES = {"IVFFlat": "o-", "IVFSQ8": "s-", "usearch": "^-", "ScaNN": "v-", "Flat": "kx",
          "jaxrec": "r*"}  # fmt: skip


def _plot(measurements: list[dict[str, Any]], path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(SELECTIVITIES), figsize=(3.4 * len(SELECTIVITIES), 7), squeeze=False
    )
    cells = {
        f"{kind}_{share:g}": (axes[row, column], f"{share:.1%}, {kind}")
        for row, kind in enumerate(KINDS)
        for column, share in enumerate(SELECTIVITIES)
    }
    cells[OWN] = cells.pop(f"near_{1.0:g}")[0], "1.0%, each query its own"
    for name, (axis, title) in cells.items():
        own = [m for m in measurements if m["filter"] == name]
        for group, style in STYLES.items():
            points = [m for m in own if m["variant"].split()[0] == group]
            axis.plot([m["recall"] for m in points], [m["value"] for m in points], style,
                      label=group, markersize=14 if style == "r*" else 4)  # fmt: skip
        axis.set(title=title, xlabel=f"recall@{K}", yscale="log", xlim=(0.6, 1.02))
    axes[0, 0].set_ylabel("queries a second")
    axes[1, 0].set_ylabel("queries a second")
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
