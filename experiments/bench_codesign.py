"""Times a filtered search: Bloom filter and IVF scan, of the probed lists alone or of all.

    python -m experiments.bench_codesign                     # an H200 with PyTorch: some minutes
    python -m experiments.bench_codesign --workloads tiny --scratch

SilverTorch's case is `20m_128`: 20 million items of 128 dimensions, 16 queries, 32 probes, the
2,048 best. "probed" runs the filter on the words of the probed lists, "all" on the whole
catalogue; both must give the same items. The peer does the first in PyTorch and Triton, from the
same index. One JSON file goes to experiments/results/bench_codesign/.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import record, report
from experiments.torch_peers import SEED, BloomPeer, IvfPeer, plain_masks, recall, run_peers
from pallas_kernels._timing import Timing, copy_of, time_interleaved
from pallas_kernels.bloom.workloads import BloomWorkload
from pallas_kernels.ivf import TILE_ROWS
from pallas_kernels.ivf.workloads import WORKLOADS, IvfWorkload

BLOCK_WORDS = 128  # of a piece of the catalogue that the filter looks at
_TILE_WORDS = TILE_ROWS // 32
SCANNED = ("queries", "centroids", "codes", "scales", "tile_offsets", "live")
"""Arguments of `ivf_search` before its mask."""
COPY = "copy"


@dataclasses.dataclass(frozen=True)
class Case:
    """A filter over the rows of an inverted file."""

    ivf: IvfWorkload

    @property
    def bloom(self) -> BloomWorkload:
        """An index of the same rows: six features of about ten values, as SilverTorch has them."""
        rows = int(self.ivf.tile_offsets(SEED)[-1]) * TILE_ROWS
        return BloomWorkload(
            rows, self.ivf.num_queries, terms_per_item=60, num_hashes=5, random_bits=True
        )

    def arrays(self) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        """Of the Bloom and of the IVF workload; the latter's own masks let everything pass."""
        ivf = dataclasses.replace(self.ivf, selectivity=1.0).arrays(SEED)
        bloom = [jax.device_put(array) for array in self.bloom.arrays(SEED)]
        return bloom, {name: jax.device_put(array) for name, array in ivf.items()}

    def search(self, bloom: list[jax.Array], ivf: dict[str, jax.Array], *, probed: bool) -> Any:
        """The best rows that may pass the filter."""
        words = ivf["live"].shape[0]
        if probed:
            blocks = self._blocks(ivf)
            found = self.bloom.run(*bloom, None, blocks, tile_words=BLOCK_WORDS).possibly
            mask = _scatter(found.reshape(*blocks.shape, BLOCK_WORDS), blocks, words)
        else:
            mask = self.bloom.run(*bloom).possibly[:, :words]
        return self.scan(ivf, mask)

    def scan(self, ivf: dict[str, jax.Array], mask: jax.Array, **options: Any) -> Any:
        """The IVF search with a mask for each query."""
        return self.ivf.run(*(ivf[name] for name in SCANNED), mask, **options)

    def _blocks(self, ivf: dict[str, jax.Array]) -> jax.Array:
        """Pieces of the catalogue that the probed lists lie in, -1 for none; i32[Q, pieces]."""
        queries, centroids = jnp.asarray(ivf["queries"]), jnp.asarray(ivf["centroids"])
        _, lists = jax.lax.top_k(queries @ centroids.T, self.ivf.nprobe)
        starts = ivf["tile_offsets"][lists] * _TILE_WORDS // BLOCK_WORDS
        ends = -(-ivf["tile_offsets"][lists + 1] * _TILE_WORDS // BLOCK_WORDS)
        longest = int(np.diff(self.ivf.tile_offsets(SEED)).max()) * _TILE_WORDS
        blocks = starts[..., None] + jnp.arange(longest // BLOCK_WORDS + 2)
        return jnp.where(blocks < ends[..., None], blocks, -1).reshape(len(queries), -1)

    def floor_bytes(self) -> int:
        """Codes and scales of the probed lists, and the words of the filter's rows for them."""
        share = self.ivf.distinct_lists() / self.ivf.num_lists
        return round(self.ivf.floor_bytes() + share * self.bloom.row_bytes() / self.ivf.num_queries)


def _scatter(found: jax.Array, blocks: jax.Array, words: int) -> jax.Array:
    """The masks of pieces in their places among the words of all rows; zeros elsewhere."""
    num_queries, _, width = found.shape
    pieces = -(-words // width)
    query = jnp.arange(num_queries)[:, None]
    mask = jnp.zeros((num_queries, pieces, width), found.dtype)
    mask = mask.at[query, jnp.where(blocks < 0, pieces, blocks)].set(found, mode="drop")
    return mask.reshape(num_queries, -1)[:, :words]


def main() -> None:
    """Runs the benchmark from the command line."""
    options = _options()
    measurements: list[dict[str, Any]] = []
    floors, checks = {}, {}
    report.print_timing_head()
    for name in options.workloads:
        case = Case(WORKLOADS[name])
        bloom, ivf = case.arrays()
        variants = variants_of(case, bloom, ivf)
        if differing := differing_items(variants):
            raise SystemExit(f"{name}: {differing} items differ; nothing is recorded")
        floors[name] = case.floor_bytes()
        timings = time_interleaved(
            variants | {COPY: copy_of(floors[name])}, repeats=options.repeats
        )
        peers, checks[name] = _peers(case, bloom, ivf, options.repeats)
        for variant, timing in (timings | peers).items():
            report.print_timing(name, variant, timing, floors[name], timings[COPY])
            measurements.append(record.time_measurement(name, variant, timing))
    path = record.write(
        "bench_codesign",
        config={"workloads": list(options.workloads), "floor_bytes": floors},
        measurements=measurements,
        checks={"differing_items": 0, "peers": checks},
        seeds=[SEED],
        scratch=options.scratch,
    )
    print(f"wrote {path}")


def _options() -> argparse.Namespace:
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description="Times filtered searches end to end.")
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=list(WORKLOADS),
        default=["10m_128", "20m_128"] if on_gpu else ["tiny"],
    )
    parser.add_argument("--repeats", type=int, default=20, help="samples of each variant")
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    return parser.parse_args()


def variants_of(case: Case, bloom: Any, ivf: Any) -> dict[str, Callable[[], Any]]:
    """One compiled call for each way."""
    variants = {}
    for name, probed in {"probed": True, "all": False}.items():
        run = jax.jit(lambda bloom, ivf, probed=probed: case.search(bloom, ivf, probed=probed))
        compiled = run.lower(bloom, ivf).compile()
        variants[name] = lambda compiled=compiled: compiled(bloom, ivf)
    return variants


def differing_items(variants: dict[str, Callable[[], Any]]) -> int:
    """Results of complete answers that are not the same in both ways."""
    probed, whole = variants["probed"](), variants["all"]()
    both = np.asarray(probed.complete & whole.complete)
    return int(np.sum(np.asarray(probed.scores)[both] != np.asarray(whole.scores)[both]))


def _peers(
    case: Case, bloom: Any, ivf: Any, repeats: int
) -> tuple[dict[str, Timing], dict[str, Any]]:
    if jax.default_backend() != "gpu":
        return {}, {}
    words = ivf["live"].shape[0]
    plain = plain_masks(case.bloom, bloom)[:, :words]
    wanted = np.asarray(case.scan(ivf, plain, backend="xla").rows)

    def probed() -> Callable[[], Any]:
        peer = IvfPeer(case.ivf, ivf)
        return peer.triton(BloomPeer(case.bloom, bloom).triton_tiles(peer.max_tiles))

    makers = {"triton probed": probed}
    return run_peers(
        makers, lambda found: {"recall": recall(found[1].cpu().numpy(), wanted)}, repeats=repeats
    )


if __name__ == "__main__":
    main()
