"""Times IVF searches: every backend of this device, beside a copy of the floor and PyTorch peers.

    python -m experiments.bench_ivf                       # an H200 with PyTorch: several minutes
    python -m experiments.bench_ivf --workloads tiny --scratch

The peers search the same index in PyTorch, one by a gather of the probed rows, one by a Triton scan
that writes every score; both then take `torch.topk`. Answers are compared first: where the kernel
calls its answer complete, a score that differs from the reference's ends the run. One JSON file
goes to experiments/results/bench_ivf/.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import record, report
from pallas_kernels import BackendError, probed_tiles_bound
from pallas_kernels._timing import Timing, copy_of, time_interleaved
from pallas_kernels.ivf import TILE_ROWS, IvfKernelConfig, quantise
from pallas_kernels.ivf.workloads import WORKLOADS, IvfWorkload

SEED = 0
COPY = "copy"
VARIANTS: dict[str, dict[str, Any]] = {
    "mosaic_gpu": {"backend": "mosaic_gpu"},
    "query_major": {"backend": "mosaic_gpu", "config": IvfKernelConfig(8, 64, 8)},
    "list_major": {"backend": "mosaic_gpu", "config": IvfKernelConfig(8, 32, 8, share=True)},
    "xla": {"backend": "xla"},
}


def main() -> None:
    """Runs the benchmark from the command line."""
    options = _options()
    if jax.default_backend() != "gpu":
        print("no NVIDIA GPU here: the kernel and its peers are not measured")
    measurements: list[dict[str, Any]] = []
    floors, answers = {}, {}
    report.print_timing_head()
    for name in options.workloads:
        workload = WORKLOADS[name]
        arrays = {key: jax.device_put(value) for key, value in workload.arrays(SEED).items()}
        variants = _variants(workload, arrays)
        answers[name] = {variant: _compare(variants, variant) for variant in variants}
        if sum(found["wrong"] for found in answers[name].values()):
            raise SystemExit(f"{name}: wrong scores, nothing is recorded: {answers[name]}")
        floors[name] = workload.floor_bytes()
        variants[COPY] = copy_of(floors[name])
        timings = time_interleaved(variants, repeats=options.repeats)
        timings |= _peers(workload, arrays, variants, answers[name], options.repeats)
        for variant, timing in timings.items():
            report.print_timing(name, variant, timing, floors[name], timings[COPY])
            measurements.append(record.time_measurement(name, variant, timing))
    path = record.write(
        "bench_ivf",
        config={"workloads": list(options.workloads), "floor_bytes": floors},
        measurements=measurements,
        checks={"answers": answers},
        seeds=[SEED],
        scratch=options.scratch,
    )
    print(f"wrote {path}")


def _options() -> argparse.Namespace:
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description="Times IVF searches.")
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=list(WORKLOADS),
        default=list(WORKLOADS) if on_gpu else ["tiny"],
    )
    parser.add_argument("--repeats", type=int, default=20, help="samples of each variant")
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    return parser.parse_args()


def _variants(workload: IvfWorkload, arrays: dict[str, jax.Array]) -> dict[str, Callable[[], Any]]:
    """One compiled call for each variant that this device supports."""
    variants: dict[str, Callable[[], Any]] = {}
    for name, static in VARIANTS.items():
        run = jax.jit(functools.partial(workload.run, **static))
        try:
            compiled = run.lower(*arrays.values()).compile()
        except BackendError as error:
            print(f"skipped {name}: {error}")
            continue
        if name != "xla" and "ivf_scan" not in (compiled.as_text() or ""):
            raise SystemExit(f"{name}: the compiled program does not hold the kernel")
        variants[name] = functools.partial(compiled, *arrays.values())
    return variants


def _compare(variants: dict[str, Callable[[], Any]], name: str) -> dict[str, float]:
    """Wrong scores of complete answers; share of complete answers; recall of all."""
    found, wanted = variants[name](), variants["xla"]()
    scores, complete = np.asarray(found.scores), np.asarray(found.complete)
    return {
        "wrong": int(np.sum(scores[complete] != np.asarray(wanted.scores)[complete])),
        "complete": float(np.mean(complete)),
        "recall": _recall(np.asarray(found.rows), np.asarray(wanted.rows)),
    }


def _recall(rows: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the wanted rows that were found."""
    hits = [np.isin(want[want >= 0], row) for row, want in zip(rows, wanted, strict=True)]
    return float(np.mean(np.concatenate(hits))) if sum(map(len, hits)) else 1.0


def _peers(workload, arrays, variants, answers, repeats: int) -> dict[str, Timing]:
    """Times of the PyTorch peers; their recall goes to `answers`."""
    if jax.default_backend() != "gpu":
        return {}
    wanted = np.asarray(variants["xla"]().rows)
    timings = {}
    for name, make in {"torch": _torch_gather, "triton": _triton_scan}.items():
        try:
            call = make(workload, arrays)
            _, rows = call()
            answers[name] = {"recall": _recall(rows.cpu().numpy(), wanted)}
            timings[name] = _time_torch(call, repeats)
        except Exception as error:  # a peer that is missing or fails must not cost the run
            print(f"skipped {name}: {type(error).__name__}: {error}")
            answers[name] = {"error": str(error)}
    return timings


def _time_torch(call: Callable[[], Any], repeats: int) -> Timing:
    """Device time of each call, the L2 cache emptied before it."""
    import torch  # pyright: ignore[reportMissingImports]

    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    samples = []
    for _ in range(2 + repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1e3)
    return Timing(tuple(samples[2:]))


class _TorchIndex:
    """The index as PyTorch tensors, and the tiles that each query scans."""

    def __init__(self, workload: IvfWorkload, arrays: dict[str, jax.Array]):
        import torch  # pyright: ignore[reportMissingImports]

        self.torch, self.k, self.nprobe = torch, workload.k, workload.nprobe
        self.max_tiles = probed_tiles_bound(workload.tile_offsets(SEED), workload.nprobe)
        query_codes, _ = quantise(arrays["queries"])
        words = jax.lax.bitcast_convert_type(arrays["mask"] & arrays["live"], jnp.int32)
        named = arrays | {"query_codes": query_codes, "words": words}
        kept = ("queries", "centroids", "codes", "scales", "tile_offsets", "query_codes", "words")
        jax.block_until_ready([named[name] for name in kept])
        self.tensors = {name: torch.from_dlpack(named[name]) for name in kept}

    def tiles(self) -> Any:
        """i32[Q, max_tiles]; -1 behind the last."""
        torch, t = self.torch, self.tensors
        lists = (t["queries"] @ t["centroids"].T).topk(self.nprobe, dim=1).indices
        starts = t["tile_offsets"][lists]
        sizes = t["tile_offsets"][lists + 1] - starts
        ends = sizes.cumsum(1)
        slot = torch.arange(self.max_tiles, device=ends.device)
        slots = slot.expand(len(ends), -1).contiguous()
        which = torch.searchsorted(ends, slots, right=True).clamp_max(self.nprobe - 1)
        tiles = (starts - (ends - sizes)).gather(1, which) + slot
        return torch.where(slot < ends[:, -1:], tiles, -1).to(torch.int32)


def _torch_gather(workload: IvfWorkload, arrays: dict[str, jax.Array]) -> Callable[[], Any]:
    """Gathers the probed rows of one query after the other; products in float32."""
    index = _TorchIndex(workload, arrays)
    torch, t = index.torch, index.tensors
    lane = torch.arange(TILE_ROWS, device="cuda")
    bit = torch.arange(32, device="cuda", dtype=torch.int32)

    def search() -> Any:
        found = []
        for query, tiles in enumerate(index.tiles()):
            rows = (tiles.clamp_min(0)[:, None] * TILE_ROWS + lane).reshape(-1)
            scores = t["codes"][rows].float() @ t["query_codes"][query].float() * t["scales"][rows]
            words = t["words"][query].reshape(-1, 2)[tiles.clamp_min(0)]
            passes = ((words[..., None] >> bit) & 1).bool().reshape(-1)
            passes &= (tiles >= 0).repeat_interleave(TILE_ROWS)
            scores = scores.masked_fill(~passes, float("-inf"))
            best, places = scores.topk(min(index.k, len(scores)))
            found.append((best, rows[places]))
        return tuple(torch.stack(part) for part in zip(*found, strict=True))

    return search


def _triton_scan(workload: IvfWorkload, arrays: dict[str, jax.Array]) -> Callable[[], Any]:
    """A Triton program a query and tile writes its scores; `torch.topk` reads them all."""
    index = _TorchIndex(workload, arrays)
    torch, t = index.torch, index.tensors
    kernel = _triton_kernel()
    num_queries, width = t["query_codes"].shape
    scores = torch.empty(num_queries, index.max_tiles * TILE_ROWS, device="cuda")

    def search() -> Any:
        tiles = index.tiles()
        kernel[(index.max_tiles, num_queries)](
            t["codes"], t["scales"], t["query_codes"], t["words"], tiles, scores,
            index.max_tiles, t["words"].shape[1], WIDTH=width, ROWS=TILE_ROWS,
        )  # fmt: skip
        best, places = scores.topk(min(index.k, scores.shape[1]), dim=1)
        tile = tiles.gather(1, places // TILE_ROWS)
        return best, tile * TILE_ROWS + places % TILE_ROWS

    return search


def _triton_kernel() -> Any:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def scan(
        codes, scales, queries, words, tiles, scores, max_tiles, num_words,
        WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        slot, query = tl.program_id(0), tl.program_id(1)
        tile = tl.load(tiles + query * max_tiles + slot).to(tl.int64)
        lane, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        out = scores + query.to(tl.int64) * max_tiles * ROWS + slot * ROWS + lane
        if tile < 0:
            tl.store(out, tl.full((ROWS,), float("-inf"), tl.float32))
        else:
            row = tile * ROWS + lane
            own = tl.load(codes + row[:, None] * WIDTH + column[None, :]).to(tl.int32)
            wanted = tl.load(queries + query * WIDTH + column).to(tl.int32)
            score = tl.sum(own * wanted[None, :], axis=1).to(tl.float32) * tl.load(scales + row)
            word = tl.load(words + query.to(tl.int64) * num_words + row // 32)
            passes = (word >> (row % 32).to(tl.int32)) & 1
            tl.store(out, tl.where(passes != 0, score, float("-inf")))

    return scan


if __name__ == "__main__":
    main()
