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
import numpy as np

from experiments import record, report
from experiments.torch_peers import SEED, IvfPeer, recall, run_peers
from pallas_kernels import BackendError
from pallas_kernels._timing import Timing, copy_of, time_interleaved
from pallas_kernels.ivf import IvfKernelConfig
from pallas_kernels.ivf.workloads import WORKLOADS, IvfWorkload

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
        "recall": recall(np.asarray(found.rows), np.asarray(wanted.rows)),
    }


def _peers(workload, arrays, variants, answers, repeats: int) -> dict[str, Timing]:
    """Times of the PyTorch peers; their recall goes to `answers`."""
    if jax.default_backend() != "gpu":
        return {}
    wanted = np.asarray(variants["xla"]().rows)
    makers = {
        "torch": lambda: IvfPeer(workload, arrays).torch(),
        "triton": lambda: IvfPeer(workload, arrays).triton(),
    }
    timings, checks = run_peers(
        makers, lambda found: {"recall": recall(found[1].cpu().numpy(), wanted)}, repeats=repeats
    )
    answers |= checks
    return timings


if __name__ == "__main__":
    main()
