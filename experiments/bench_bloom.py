"""Times Bloom searches: every backend of this device, beside a copy of the bytes and PyTorch peers.

    python -m experiments.bench_bloom                       # an H200 with PyTorch: some minutes
    python -m experiments.bench_bloom --workloads tiny 1m_q64 --scratch

Masks of all backends are compared first; a difference ends the run. The peers have one mask and
complement it for NOT, which loses items; theirs are compared with ours combined in that way. One
JSON file goes to experiments/results/bench_bloom/.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import record, report
from experiments.torch_peers import SEED, BloomPeer, plain_masks, run_peers
from pallas_kernels import BackendError
from pallas_kernels._timing import Timing, copy_of, time_interleaved
from pallas_kernels.bloom.workloads import WORKLOADS, BloomWorkload

BACKENDS = ("mosaic_gpu", "xla")
COPY = "copy"


def main() -> None:
    """Runs the benchmark from the command line."""
    options = _options()
    measurements: list[dict[str, Any]] = []
    floors, differing, answers = {}, 0, {}
    report.print_timing_head()
    for name in options.workloads:
        workload = WORKLOADS[name]
        arrays = [jax.device_put(array) for array in workload.arrays(SEED)]
        variants = _variants(workload, arrays)
        differing += _differing_words(variants)
        if differing:
            raise SystemExit(f"{name}: backends differ in {differing} words; nothing is recorded")
        floors[name] = workload.floor_bytes()
        variants[COPY] = copy_of(floors[name])
        timings = time_interleaved(variants, repeats=options.repeats)
        peers, answers[name] = _peers(workload, arrays, options.repeats)
        timings |= peers
        for variant, timing in timings.items():
            report.print_timing(name, variant, timing, floors[name], timings[COPY])
            measurements.append(record.time_measurement(name, variant, timing))
    path = record.write(
        "bench_bloom",
        config={"workloads": list(options.workloads), "floor_bytes": floors},
        measurements=measurements,
        checks={"differing_words": differing, "peers": answers},
        seeds=[SEED],
        scratch=options.scratch,
    )
    print(f"wrote {path}")


def _options() -> argparse.Namespace:
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description="Times Bloom searches.")
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=list(WORKLOADS),
        default=list(WORKLOADS) if on_gpu else ["tiny", "1m_q1", "1m_q64"],
    )
    parser.add_argument("--repeats", type=int, default=20, help="samples of each variant")
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    return parser.parse_args()


def _variants(workload: BloomWorkload, arrays: list[jax.Array]) -> dict[str, Callable[[], Any]]:
    """One compiled call for each backend that this device supports."""
    variants: dict[str, Callable[[], Any]] = {}
    for backend in BACKENDS:
        run = jax.jit(functools.partial(workload.run, backend=backend))
        try:
            compiled = run.lower(*arrays).compile()
        except BackendError as error:
            print(f"skipped {backend}: {error}")
            continue
        if backend == "mosaic_gpu" and "bloom_search_mosaic_gpu" not in (compiled.as_text() or ""):
            raise SystemExit("the compiled program does not hold the kernel")
        variants[backend] = functools.partial(compiled, *arrays)
    return variants


def _differing_words(variants: dict[str, Callable[[], Any]]) -> int:
    """Words in which any backend's masks differ from the reference's."""
    wanted = variants["xla"]()
    return sum(
        int(np.sum(np.asarray(mask) != np.asarray(want)))
        for call in variants.values()
        for mask, want in zip(call(), wanted, strict=True)
    )


def _peers(
    workload: BloomWorkload, arrays: list[jax.Array], repeats: int
) -> tuple[dict[str, Timing], dict[str, Any]]:
    if jax.default_backend() != "gpu":
        return {}, {}
    words = workload.num_items // 32  # whole ones; peers leave bits behind the last item alone
    wanted = np.asarray(plain_masks(workload, arrays))[:, :words]

    def check(masks: Any) -> dict[str, int]:
        found = masks.cpu().numpy().view(np.uint32)[:, :words]
        return {"differing_words": int(np.sum(found != wanted))}

    makers = {
        "torch": lambda: BloomPeer(workload, arrays).torch(),
        "triton": lambda: BloomPeer(workload, arrays).triton(),
    }
    return run_peers(makers, check, repeats=repeats)


if __name__ == "__main__":
    main()
