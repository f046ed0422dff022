"""Memory of training MoE layers, from sizes alone: what is saved, the peak, and what fits a GPU.

    python -m experiments.moe_memory                                  # the paper's layers
    python -m experiments.moe_memory --compile                        # beside compiled programs
    python -m experiments.moe_memory --model sonic_7b --layers 24 --gpu H200

Counted are expert layers in bf16: their arguments, results, what is saved, and temporaries.
Attention, embeddings and the router are left out. `--compile` compiles for an H200, without one
where the CUDA plugin is installed; without either it says so. `--record` keeps the result.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import record, report
from pallas_kernels import MoeShape, moe_ffn, moe_memory
from pallas_kernels.moe.workloads import WORKLOADS

GPUS = {"H100": 80, "H200": 141, "GH200": 96, "B200": 180, "B300": 288}  # GB
HOPPER = ("H100", "H200", "GH200")  # the kernels' own; others run the XLA reference
PAPER = tuple(f"conf{number}" for number in range(1, 8))
POLICIES = ("gate_up", "gate_up_fp8", "x")
CHUNKS = (None, 16_384, 4096)
OPTIMIZER_BYTES = 12  # a weight: an f32 master copy and two f32 moments
GB = 10**9
RUNS = Path("runs") / "moe_memory"

# Bytes a token in bf16 that others keep, from their code or paper, by D, H, K; first with a gated
# activation, then without. Routing structures are left out.
PEERS: dict[str, tuple[Callable[[int, int, int], int], Callable[[int, int, int], int]]] = {
    "MegaBlocks": (
        lambda d, h, k: 2 * k * (2 * d + 4 * h),
        lambda d, h, k: 2 * k * (2 * d + 2 * h),
    ),
    "ScatterMoE": (
        lambda d, h, k: 2 * d + 2 * k * (d + 4 * h),
        lambda d, h, k: 2 * d + 2 * k * (d + 2 * h),
    ),
    "MoEBlaze, alg. 1": (
        lambda d, h, k: 2 * d + 6 * k * h,
        lambda d, h, k: 2 * d + 4 * k * h,
    ),
}


def main() -> None:
    """Prints the tables that the command line asks for."""
    options = _options()
    compile_peak = _compiler(options.minutes) if options.compile else None
    cases = [(name, act) for act in ("swiglu", "silu") for name in options.workloads]
    saved = [saved_row(*case) for case in cases]
    report.print_table("GB that one layer in bf16 saves for its gradient", saved)
    peaks = [peak_row(*case, compile_peak) for case in cases]
    report.print_table("GB at the peak of one layer's forward and backward pass", peaks)
    chunks = chunk_rows(options.model, compile_peak)
    report.print_table(f"Peak GB of `{options.model}` by tokens and chunk_tokens", chunks)
    gpus = [options.gpu] if options.gpu else list(GPUS)
    fits = [fit_row(options.model, options.layers, gpu, GPUS[gpu]) for gpu in gpus]
    title = f"Most tokens a GPU: {options.layers} layers of `{options.model}` and their optimizer"
    report.print_table(title, fits)
    if options.record:
        path = record.write(
            "moe_memory",
            config={"model": options.model, "layers": options.layers, "compiled": options.compile},
            measurements=_measurements(saved=saved, peak=peaks, chunks=chunks, fits=fits),
            scratch=options.scratch,
        )
        path.with_suffix(".png").write_bytes(chunk_plot(options.model))
        print(f"wrote {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(PAPER))
    parser.add_argument("--model", choices=list(WORKLOADS), default="conf3")
    parser.add_argument("--layers", type=int, default=12, help="such layers in the model")
    parser.add_argument("--gpu", choices=list(GPUS))
    parser.add_argument("--compile", action="store_true", help="compiled peaks too; half an hour")
    parser.add_argument("--minutes", type=float, default=120.0, help="for compiles, then no more")
    parser.add_argument("--record", action="store_true", help="keeps the result")
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    return parser.parse_args()


def shape_of(name: str, **changes: Any) -> MoeShape:
    """The layer of a workload, as `moe_memory` takes it."""
    w = WORKLOADS[name]
    shape = MoeShape(w.num_tokens, w.width, w.hidden, w.num_experts, w.slots)
    return dataclasses.replace(shape, **changes)


def saved_row(name: str, activation: Any) -> dict[str, Any]:
    """Saved GB of every policy, beside what others save."""
    shape = shape_of(name, activation=activation)
    row: dict[str, Any] = {"layer": f"{name} {activation}"}
    for save in POLICIES:
        row[save] = round(moe_memory(dataclasses.replace(shape, save=save)).saved / GB, 2)
    for peer, formulas in PEERS.items():
        a_token = formulas[activation == "silu"](shape.width, shape.hidden, shape.slots)
        row[peer] = round(shape.num_tokens * a_token / GB, 2)
    return row


def peak_row(
    name: str, activation: Any, compile_peak: Callable[[MoeShape], int | None] | None
) -> dict[str, Any]:
    """Peak GB of every policy, as predicted and, where asked for, as compiled."""
    row: dict[str, Any] = {"layer": f"{name} {activation}"}
    for save in POLICIES:
        shape = shape_of(name, activation=activation, save=save)
        row[save] = round(moe_memory(shape).peak / GB, 2)
        if compile_peak is not None:
            row[f"{save}, compiled"] = _gigabytes(compile_peak(shape))
    return row


def _gigabytes(num_bytes: int | None) -> float | str:
    return "-" if num_bytes is None else round(num_bytes / GB, 2)


def chunk_rows(
    model: str, compile_peak: Callable[[MoeShape], int | None] | None = None
) -> list[dict[str, Any]]:
    """Peak by tokens, for each chunk and the two policies that differ most."""
    tokens = shape_of(model).num_tokens
    rows = []
    for count in (tokens // 4, tokens // 2, tokens, 2 * tokens, 4 * tokens):
        row: dict[str, Any] = {"T": f"{count:,}"}
        for save, chunk in product(("gate_up", "x"), CHUNKS):
            column = f"{save}, {'all at once' if chunk is None else f'{chunk:,}'}"
            chunk = None if chunk is None or chunk >= count else chunk
            shape = shape_of(model, num_tokens=count, save=save, chunk_tokens=chunk)
            row[column] = round(moe_memory(shape).peak / GB, 2)
            if compile_peak is not None:
                row[f"{column}, compiled"] = _gigabytes(compile_peak(shape))
        rows.append(row)
    return rows


def _peak(model: str, tokens: int, save: Any, chunk: int | None) -> int:
    return moe_memory(shape_of(model, num_tokens=tokens, save=save, chunk_tokens=chunk)).peak


def chunk_plot(model: str) -> bytes:
    """`chunk_rows` as a picture."""
    tokens = shape_of(model).num_tokens
    counts = [tokens * part // 4 for part in range(1, 17)]
    series = {
        f"{save}, {'all at once' if chunk is None else f'chunks of {chunk:,}'}": (
            [count / 1000 for count in counts],
            [_peak(model, count, save, chunk) / GB for count in counts],
        )
        for save, chunk in (("gate_up", None), ("gate_up", 4096), ("x", None), ("x", 4096))
    }
    return report.plot(series, x="thousand tokens", y=f"peak GB, {model}", bottom=0.0)


def fit_row(model: str, layers: int, gpu: str, gigabytes: int) -> dict[str, Any]:
    """Most tokens by policy, all at once and in chunks of 4,096."""
    backend = "mosaic_gpu" if gpu in HOPPER else "xla"
    row: dict[str, Any] = {"GPU": f"{gpu}, {gigabytes} GB, {backend}"}
    for save in POLICIES:
        for chunk in (None, 4096) if backend == "mosaic_gpu" else (None,):
            shape = shape_of(model, save=save, chunk_tokens=chunk, backend=backend)
            row[save if chunk is None else f"{save}, chunks"] = shape.most_tokens(
                gigabytes * GB, layers=layers, optimizer_bytes=OPTIMIZER_BYTES
            )
    columns = [name for save in POLICIES for name in (save, f"{save}, chunks")]
    return {name: row.get(name, "-") for name in ("GPU", *columns)}


def _compiler(minutes: float | int) -> Callable[[MoeShape], int | None]:
    """Peak bytes of the layer's program, compiled for an H200; None once the time is over.

    Every result is kept in `runs/` as soon as it is there, and for these kernels not made again.
    """
    from pallas_kernels.aot import aot_available, compile_for_h200

    if reason := aot_available():
        raise SystemExit(f"--compile: {reason}")
    kernels = record.git_sources("pallas_kernels")
    store = RUNS / f"{kernels}.jsonl" if kernels else None
    lines = store.read_text().splitlines() if store and store.exists() else []
    known: dict[str, int] = dict(json.loads(line) for line in lines)
    end = time.monotonic() + 60 * minutes

    def peak(shape: MoeShape) -> int | None:
        if str(shape) not in known:
            if time.monotonic() >= end:
                return None
            print(f"compiling {shape}", flush=True)
            report = compile_for_h200(*training_program(shape), kernels=False)
            known[str(shape)] = record.peak_bytes(report.compiled.memory_analysis())
            if store:
                store.parent.mkdir(parents=True, exist_ok=True)
                with store.open("a") as file:
                    file.write(f"{json.dumps([str(shape), known[str(shape)]])}\n")
        return known[str(shape)]

    return peak


def training_program(shape: MoeShape) -> tuple[Any, ...]:
    """Forward and backward of a layer in bf16 as one function, and the shapes that it takes."""
    inner = (shape.num_experts, shape.width, shape.hidden)
    x, up, down = (
        jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
        for sizes in ((shape.num_tokens, shape.width), inner, (inner[0], inner[2], inner[1]))
    )
    pairs = (shape.num_tokens, shape.slots)
    ids, gates = (jax.ShapeDtypeStruct(pairs, dtype) for dtype in (jnp.int32, jnp.float32))
    gate = None if shape.activation == "silu" else up

    def run(x, ids, gates, weights, dy):
        def op(x, gates, weights):
            return moe_ffn(
                x,
                ids,
                gates,
                *weights,
                activation=shape.activation,
                save=shape.save,
                chunk_tokens=shape.chunk_tokens,
            )

        y, pull = jax.vjp(op, x, gates, weights)
        return y, pull(dy)

    return run, x, ids, gates, (gate, up, down), x


def _measurements(**tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every number of the tables: tokens of what fits, gigabytes elsewhere."""
    return [
        {
            "metric": f"{table} {column}",
            "unit": "tokens" if table == "fits" else "GB",
            "workload": next(iter(row.values())),
            "value": value,
        }
        for table, rows in tables.items()
        for row in rows
        for column, value in row.items()
        if not isinstance(value, str)
    ]


if __name__ == "__main__":
    main()
