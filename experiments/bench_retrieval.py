"""Times filtered search beside faiss: recall@k against queries a second, in one run.

    python -m experiments.bench_retrieval            # 200,000 items, 64 wide, 512 lists, k = 100
    python -m experiments.bench_retrieval --quick    # 20,000 items

A batch of queries shares one filter, which is what faiss can search at once (an `IDSelectorBitmap`,
made beforehand); ours compiles the filter beforehand too. Variants take turns. faiss sweeps nprobe;
ours is asked once, as its planner chooses. One JSON file and a plot go to
experiments/results/bench_retrieval/.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import record
from jaxrec.retrieval import ItemIndex, Strategy, brute_force, recall

SEED, WIDTH, K = 0, 64, 100
SELECTIVITIES = (0.001, 0.01, 0.1, 0.5, 1.0)
KINDS = ("random", "near")


def main() -> None:
    """Runs the benchmark from the command line."""
    options = _options()
    rows, queries, tuning = _embeddings(options.items, options.batch)
    filters = _filters(rows)
    features = {name: passes.astype(int).tolist() for name, passes in filters.items()}
    index = ItemIndex.build(
        rows, features, key=jax.random.key(SEED), nlist=options.lists, sample_queries=tuning
    )
    peers = _faiss_indexes(rows, options.lists, options.threads)
    measurements: list[dict[str, Any]] = []
    for name, passes in filters.items():
        truth = brute_force(queries, rows, np.flatnonzero(passes), k=K)
        variants = _ours(index, queries, name) | _faiss_variants(peers, queries, passes)
        samples = _interleaved(variants, options.repeats)
        for variant, seconds in samples.items():
            ids, note = variants[variant]()
            measured = {
                "metric": "queries a second",
                "unit": "1/s",
                "filter": name,
                "variant": variant,
                "recall": recall(ids, truth),
                "samples": [options.batch / s for s in seconds],
                "value": options.batch / float(np.median(seconds)),
                "note": note,
            }
            measurements.append(measured)
            print(f"{name:14} {variant:16} {measured['value']:9.0f} q/s "
                  f"recall {measured['recall']:.4f} {note}", flush=True)  # fmt: skip
    path = record.write(
        "bench_retrieval",
        config=vars(options) | {"width": WIDTH, "k": K, "nprobe": index.nprobe},
        measurements=measurements,
        seeds=[SEED],
        scratch=options.scratch,
    )
    print(f"wrote {path}")
    _plot(measurements, path.with_suffix(".png"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times filtered search beside faiss.")
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


type Variant = Callable[[], tuple[np.ndarray, str]]


def _ours(index: ItemIndex, queries: np.ndarray, name: str) -> dict[str, Variant]:
    plan, asked = index.compile([f"{name}:1"]), jnp.asarray(queries)[None]
    strategy = Strategy(int(index.plan_of(asked, plan, k=K).strategy[0])).name

    def search() -> tuple[np.ndarray, str]:
        return np.asarray(_search(index, asked, plan).ids[0]), strategy

    return {"jaxrec": search}


@functools.partial(jax.jit)
def _search(index, queries, plan):
    return index.search(queries, plan, k=K)


def _faiss_indexes(rows: np.ndarray, lists: int, threads: int) -> dict[str, Any]:
    import faiss  # pyright: ignore[reportMissingImports]

    faiss.omp_set_num_threads(threads)
    made = {}
    for name, spec in (("IVFFlat", "Flat"), ("IVFSQ8", "SQ8")):
        made[name] = faiss.index_factory(WIDTH, f"IVF{lists},{spec}", faiss.METRIC_INNER_PRODUCT)
        made[name].train(rows)
        made[name].add(rows)
    made["Flat"] = rows
    return made


def _faiss_variants(peers, queries: np.ndarray, passes: np.ndarray) -> dict[str, Variant]:
    import faiss  # pyright: ignore[reportMissingImports]

    bits = np.packbits(passes, bitorder="little")
    selector = faiss.IDSelectorBitmap(bits)  # pyright: ignore[reportCallIssue]
    variants: dict[str, Variant] = {}
    for name in ("IVFFlat", "IVFSQ8"):
        lists = peers[name].nlist
        for nprobe in (lists // 16, lists // 8, lists // 4, 3 * lists // 8, lists // 2, lists):
            parameters = faiss.SearchParametersIVF()
            parameters.nprobe = nprobe
            if not passes.all():
                parameters.sel = selector

            def search(index=peers[name], parameters=parameters) -> tuple[np.ndarray, str]:
                return index.search(queries, K, params=parameters)[1], ""

            variants[f"{name} {nprobe}"] = search
    # Flat over a copy of the eligible rows, made beforehand: what one fixed filter could have.
    eligible = np.flatnonzero(passes)
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(peers["Flat"][eligible])

    def search_flat() -> tuple[np.ndarray, str]:
        found = flat.search(queries, K)[1]
        return np.where(found >= 0, eligible[found], -1), "a copy of the eligible rows"

    return variants | {"Flat copy": search_flat}


def _interleaved(variants: dict[str, Variant], repeats: int) -> dict[str, list[float]]:
    for call in variants.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return samples


def _plot(measurements: list[dict[str, Any]], path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(SELECTIVITIES), figsize=(3.2 * len(SELECTIVITIES), 6), squeeze=False
    )
    for row, kind in enumerate(KINDS):
        for column, share in enumerate(SELECTIVITIES):
            axis, name = axes[row, column], f"{kind}_{share:g}"
            own = [m for m in measurements if m["filter"] == name]
            axis.set_visible(bool(own))
            for group, style in (("IVFFlat", "o-"), ("IVFSQ8", "s-"), ("Flat", "x"),
                                 ("jaxrec", "*")):  # fmt: skip
                points = [m for m in own if m["variant"].split()[0] == group]
                axis.plot([m["recall"] for m in points], [m["value"] for m in points], style,
                          label=group, markersize=12 if style == "*" else 5)  # fmt: skip
            axis.set(title=f"{share:.1%}, {kind}", xlabel=f"recall@{K}", yscale="log")
    axes[0, 0].set_ylabel("queries a second")
    axes[1, 0].set_ylabel("queries a second")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
