"""Measures the constants of the search planner on this machine.

    python -m experiments.calibrate_planner        # writes jaxrec/retrieval/tuned/<device>/

Small programs are timed in turns; the constants follow from their medians.
"""

import argparse
import functools
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np

from experiments import record
from jaxrec.retrieval import CostModel, ItemIndex
from jaxrec.retrieval.filtered_search import search_compact
from jaxrec.retrieval.ivf_index import search_rows
from jaxrec.retrieval.planner import tuned_path
from pallas_kernels._timing import time_interleaved

WIDTH, LISTS, K = 64, 64, 100
PROBING, FEW, MANY = 8, 16, 64  # queries of a batch
SPARSE, DENSE = 1_000, 4_000  # eligible rows


def main() -> None:
    """Measures, prints and writes the constants."""
    parser = argparse.ArgumentParser(description="Measures the search planner's constants.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    costs = measure(options.rows, options.repeats)
    path = tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    record.write_json(path, {
        "costs": asdict(costs),
        "command": record.command_line(),
        "git": record.git_state(),
        "env": record.environment(),
    })  # fmt: skip
    print(costs)
    print(f"wrote {path.name}")


def measure(num_rows: int, repeats: int) -> CostModel:
    """The constants from timings of searches over random rows."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(num_rows, WIDTH)).astype(np.float32)
    queries = jnp.asarray(rng.normal(size=(MANY, WIDTH)).astype(np.float32))
    eligible = {
        str(count): np.isin(np.arange(num_rows), rng.choice(num_rows, count, replace=False))
        for count in (SPARSE, DENSE)
    }
    whole = ItemIndex.build(
        rows, {name: passes.astype(int).tolist() for name, passes in eligible.items()},
        key=jax.random.key(0), nlist=LISTS, sample_queries=rows[:16],
    )  # fmt: skip
    index, bloom = whole.ivf, whole.bloom
    words = len(index.live)

    @functools.partial(jax.jit, static_argnames="nprobe")
    def scan(index, queries, nprobe):
        return search_rows(index, queries, None, k=K, nprobe=nprobe, precision="rescored")

    @jax.jit
    def compact(index, bloom, plan, queries, mask):
        counts = jnp.sum(jax.lax.population_count(mask), axis=1, dtype=jnp.int32)
        return search_compact(index, bloom, plan, queries, mask, counts, K)

    def compacting(count: int, queries):
        plan = whole.compile([f"{count}:1"])
        mask = bloom.masks(plan).possibly
        return lambda: compact(index, bloom, plan, queries[None], mask)

    masks = jnp.tile(bloom.masks(whole.compile([None])).possibly, (16, 1))
    counted = jax.jit(lambda m: jnp.cumsum(jax.lax.population_count(m).astype(jnp.int32), axis=1))
    variants = {
        "probe": lambda: scan(index, queries[:PROBING], LISTS // 4),
        "scan few": lambda: scan(index, queries[:FEW], LISTS),
        "scan many": lambda: scan(index, queries, LISTS),
        "sparse": compacting(SPARSE, queries[:1]),
        "dense": compacting(DENSE, queries[:1]),
        "dense shared": compacting(DENSE, queries),
        "words": lambda: counted(masks),
    }
    ns = {n: t.p50_us * 1e3 for n, t in time_interleaved(variants, repeats=repeats).items()}
    score = (ns["scan many"] - ns["scan few"]) / (MANY - FEW) / len(index.row_ids)
    each = (ns["dense shared"] - ns["dense"]) / (MANY - 1) / DENSE
    found = {
        "mask_word": ns["words"] / 16 / words,
        "eligible_row": (ns["dense"] - ns["sparse"]) / (DENSE - SPARSE) - each,
        "eligible_score": each,
        "probed_row": ns["probe"] / PROBING / (len(index.row_ids) / 4),
        "scanned_row": ns["scan few"] / len(index.row_ids) - FEW * score,
        "scanned_score": score,
    }
    # Noise on a busy machine must not make a part free.
    return CostModel(**{name: max(value, 0.05) for name, value in found.items()})


if __name__ == "__main__":
    main()
