"""Times HSTU attention, forward and with gradients, beside other ways to attend.

    python -m experiments.bench_attention                  # a GPU: all lengths, half an hour
    python -m experiments.bench_attention --cases zipf_4k fixed_4k
    python -m experiments.bench_attention --quick --scratch   # short sequences: runs on a CPU

Sequences are all of one length, or of lengths by Zipf's law (exponent 1.2, none below 64), packed
into the same number of tokens. Ours is `hstu_attention`, with and without its biases, and in f32,
beside
  xla       the same operation's XLA reference, with and without biases
  padded    sequences padded to the longest, scores as one [B, H, L, L] array
  softmax   `softmax_attention` of the packed sequences, by the backend it takes itself, and by XLA
  jax       `jax.nn.dot_product_attention` on padded sequences: a softmax, the same products
  tokamax   tokamax's `dot_product_attention`, where it is installed; likewise
  matmul    one dense product of as many FLOPs: what the machine can do

FLOPs are those of the pairs that attend, 2·(Dqk + Dv) each and head, 3.5 times that with gradients
(five products, and two of the forward pass). Answers that must agree are compared first; one that
differs ends the run. Peak bytes are those of the compiled program with its arguments. One JSON file
and plots go to experiments/results/bench_attention/.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import record, report
from pallas_kernels import hstu_attention, softmax_attention
from pallas_kernels._banded import sequence_rows
from pallas_kernels._timing import Timing, time_interleaved

SEED = 0
TOLERANCE = 3e-2  # of the largest value: bf16 products, summed in other orders
PASSES = ("forward", "gradient")
BUCKETS = 40
SHORTEST = 64
MATMUL = 4096  # columns and rows of the dense product's right side


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences to attend in; T = num_tokens slots, all of them used."""

    name: str
    kind: Literal["fixed", "zipf"]
    longest: int
    num_tokens: int = 131_072
    heads: int = 4
    width: int = 128
    shortest: int = SHORTEST

    def lengths(self) -> np.ndarray:
        """Of each sequence; the last one takes the slots that are left."""
        if self.kind == "fixed":
            drawn = np.full(self.num_tokens // self.longest, self.longest)
        else:
            choices = np.arange(self.shortest, self.longest + 1)
            weights = choices**-1.2
            rng = np.random.default_rng(SEED)
            count = self.num_tokens // self.shortest + 1
            drawn = rng.choice(choices, count, p=weights / weights.sum())
        ends = np.minimum(np.cumsum(drawn), self.num_tokens)
        return np.diff(np.unique(ends), prepend=0)

    def flops(self, pass_name: str) -> float:
        """Of the pairs that attend; see the module's text."""
        lengths = self.lengths().astype(np.int64)
        forward = int(4 * self.width * self.heads * (lengths * (lengths + 1) // 2).sum())
        return forward if pass_name == "forward" else 3.5 * forward

    def arrays(self) -> tuple[jax.Array, ...]:
        """q, k, v, offsets, position bias, timestamps, time bias."""
        keys = jax.random.split(jax.random.key(SEED), 6)
        shape = (self.num_tokens, self.heads, self.width)
        qkv = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:3]]
        offsets = np.concatenate([[0], np.cumsum(self.lengths())]).astype(np.int32)
        position_bias = jax.random.normal(keys[3], (self.heads, self.longest))
        seconds = jax.random.exponential(keys[4], (self.num_tokens,)) * 3600
        time_bias = jax.random.normal(keys[5], (self.heads, BUCKETS))
        timestamps = jnp.minimum(jnp.cumsum(seconds), 2e9).astype(jnp.int32)
        return *qkv, jnp.asarray(offsets), position_bias, timestamps, time_bias


def cases() -> dict[str, Case]:
    """Lengths from 512 to 16k, fixed and by Zipf's law."""
    names = {512: "512", 1024: "1k", 2048: "2k", 4096: "4k", 8192: "8k", 16_384: "16k"}
    kinds: tuple[Literal["fixed", "zipf"], ...] = ("fixed", "zipf")
    found = [Case(f"{kind}_{name}", kind, n) for kind in kinds for n, name in names.items()]
    return {case.name: case for case in found}


def quick(case: Case) -> Case:
    """The same law of lengths at sizes for a CPU."""
    longest = max(case.longest // 64, 16)
    return dataclasses.replace(case, longest=longest, num_tokens=256, heads=2, width=16, shortest=4)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to attend.

    Attributes:
      run: of q, k and v.
      inputs: q, k and v as it takes them.
      packed: brings a result of `run` into packed tokens, to compare it.
      answers: variants of one name must agree; None for what computes something else.
    """

    run: Callable[..., jax.Array]
    inputs: tuple[jax.Array, ...]
    packed: Callable[[jax.Array], jax.Array] = lambda x: x
    answers: str | None = None


def variants(case: Case, pass_name: str) -> dict[str, Variant]:
    """Everything that attends here."""
    *qkv, offsets, position_bias, timestamps, time_bias = case.arrays()
    qkv = tuple(qkv)
    alpha = case.width**-0.5

    def hstu(backend, biases):
        options = {"max_len": case.longest, "alpha": alpha, "backend": backend, **biases}
        return lambda q, k, v: hstu_attention(q, k, v, offsets, **options)

    biases = {"position_bias": position_bias, "timestamps": timestamps, "time_bias": time_bias}
    wide = tuple(x.astype(jnp.float32) for x in qkv)
    found = {}
    for name, given, inputs in (("", {}, qkv), (", biases", biases, qkv), (", f32", {}, wide)):
        for backend_name, backend in (("ours", None), ("xla", "xla")):
            run = hstu(backend, given)
            found[backend_name + name] = Variant(run, inputs, answers=f"silu{name}")

    def softmax(backend):
        options = {"max_len": case.longest, "scale": alpha, "backend": backend}
        return lambda q, k, v: softmax_attention(q, k, v, offsets, **options)

    found["softmax"] = Variant(softmax(None), qkv, answers="softmax")
    found["softmax, xla"] = Variant(softmax("xla"), qkv, answers="softmax")
    return (
        found | _padded_variants(case, qkv, offsets, alpha) | {"matmul": _matmul(case, pass_name)}
    )


def _padded_variants(case, qkv, offsets, alpha) -> dict[str, Variant]:
    lengths = jnp.diff(offsets)
    rows = sequence_rows(offsets, case.num_tokens, case.longest)
    try:
        inputs = tuple(rows.split(x) for x in qkv)
    except Exception as error:  # lengths may differ too much for the memory
        print(f"{case.name}: skipped padded sequences: {type(error).__name__}")
        return {}
    packed = lambda x: rows.join(x, case.num_tokens)  # noqa: E731
    found = {"padded": Variant(_dense(case, alpha), inputs, packed, "silu")}
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    found["jax"] = Variant(
        lambda q, k, v: jax.nn.dot_product_attention(
            *(q, k, v),
            scale=alpha,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation=implementation,
        ),
        inputs,
        packed,
        "softmax",
    )
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"{case.name}: skipped tokamax: {error}")
    else:
        attend = functools.partial(tokamax.dot_product_attention, is_causal=True, scale=alpha)
        found["tokamax"] = Variant(attend, inputs, packed)
    return found


def _dense(case: Case, alpha: float) -> Callable[..., jax.Array]:
    def run(q, k, v):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        causal = jnp.tril(jnp.ones((case.longest, case.longest), bool))
        weights = jnp.where(causal, jax.nn.silu(alpha * scores), 0).astype(v.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32)
        return (out / case.longest).astype(v.dtype)

    return run


def _matmul(case: Case, pass_name: str) -> Variant:
    """Its gradient's pass is a larger product: a rate, not a derivative."""
    rows = max(int(case.flops(pass_name)) // (2 * MATMUL * MATMUL), 1)
    keys = jax.random.split(jax.random.key(SEED))
    shapes = ((rows, MATMUL), (MATMUL, MATMUL))
    inputs = tuple(jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))
    return Variant(jnp.matmul, inputs)


def program(name: str, variant: Variant, pass_name: str) -> Callable[..., Any]:
    """out, or out and the gradients of q, k and v with v as the gradient of out."""
    if pass_name == "forward" or name == "matmul":
        return lambda *inputs: (variant.run(*inputs),)

    def gradient(q, k, v):
        out, pull = jax.vjp(variant.run, q, k, v)
        return out, *pull(v)

    return gradient


@dataclasses.dataclass(frozen=True)
class Measured:
    """One variant of one case and pass."""

    timing: Timing
    peak: int


def measure(case: Case, pass_name: str, repeats: int) -> tuple[dict[str, Measured], dict[str, Any]]:
    """Every variant that runs, and the errors of those that do, or why they do not."""
    calls: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int] = {}
    checks: dict[str, Any] = {}
    wanted: dict[str, Any] = {}
    for name, variant in variants(case, pass_name).items():
        try:
            run = jax.jit(program(name, variant, pass_name))
            compiled = run.lower(*variant.inputs).compile()
            answer = jax.block_until_ready(compiled(*variant.inputs))
        except Exception as error:  # a peer that does not fit must not cost the run
            if name.startswith("ours"):
                raise
            checks[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"{case.name} {pass_name}: skipped {name}: {checks[name]}")
            continue
        if variant.answers is not None:
            answer = [variant.packed(x) for x in answer]
            checks[name] = record.largest_error(answer, wanted.setdefault(variant.answers, answer))
            if not checks[name] < TOLERANCE:
                raise SystemExit(f"{case.name} {pass_name} {name}: wrong by {checks[name]}")
        calls[name] = functools.partial(compiled, *variant.inputs)
        peaks[name] = record.peak_bytes(compiled.memory_analysis())
    timings = time_interleaved(calls, repeats=repeats)
    return {name: Measured(timing, peaks[name]) for name, timing in timings.items()}, checks


def main() -> None:
    """Runs the benchmark from the command line."""
    options = _options()
    if jax.default_backend() != "gpu":
        print("no GPU here: times and peak bytes are a CPU's, where ours is the XLA reference")
    chosen = {name: cases()[name] for name in options.cases}
    if options.quick:
        chosen = {name: quick(case) for name, case in chosen.items()}
    print(f"{'case':10} {'pass':8} {'variant':13} {'ms':>9} {'TFLOP/s':>8} {'peak MB':>9}")
    found: dict[tuple[str, str], dict[str, Measured]] = {}
    checks: dict[str, Any] = {}
    for name, case in chosen.items():
        for pass_name in PASSES:
            key = (name, pass_name)
            found[key], checks[" ".join(key)] = measure(case, pass_name, options.repeats)
            for variant, measured in found[key].items():
                print(
                    f"{name:10} {pass_name:8} {variant:13} {measured.timing.p50_us / 1e3:9.3f} "
                    f"{_rate(case, pass_name, measured):8.2f} {measured.peak / 1e6:9.2f}",
                    flush=True,
                )
    path = record.write(
        "bench_attention",
        config={"cases": {name: dataclasses.asdict(case) for name, case in chosen.items()}},
        measurements=[
            row
            for (name, pass_name), by_variant in found.items()
            for variant, measured in by_variant.items()
            for row in _measurements(chosen[name], pass_name, variant, measured)
        ],
        checks=checks,
        seeds=[SEED],
        scratch=options.scratch,
        folder=options.results,
    )
    plot(path, chosen, found)
    print(f"wrote {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times HSTU attention.")
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--repeats", type=int, default=10, help="samples of each variant")
    parser.add_argument("--quick", action="store_true", help="shrinks every case")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    options = parser.parse_args()
    options.quick = options.quick or jax.default_backend() != "gpu"
    return options


def _rate(case: Case, pass_name: str, measured: Measured) -> float:
    """TFLOP/s."""
    return case.flops(pass_name) / max(measured.timing.p50_us, 1e-9) / 1e6


def _measurements(
    case: Case, pass_name: str, variant: str, measured: Measured
) -> list[dict[str, Any]]:
    timing = measured.timing
    same = {"workload": case.name, "pass": pass_name, "backend": variant}
    return [
        {
            "metric": "time",
            "unit": "us",
            **same,
            "samples": list(timing.samples_us),
            "p20": timing.p20_us,
            "p50": timing.p50_us,
            "p80": timing.p80_us,
            "tflops": _rate(case, pass_name, measured),
        },
        {"metric": "peak", "unit": "B", **same, "value": measured.peak},
    ]


def plot(path: Path, chosen: dict[str, Case], found: dict[Any, dict[str, Measured]]) -> None:
    """Rates of both passes beside the result; 0 where a variant did not run."""
    for pass_name in PASSES:
        rows = {name: found[name, pass_name] for name in chosen}
        series = {
            variant: [
                _rate(chosen[name], pass_name, row[variant]) if variant in row else 0.0
                for name, row in rows.items()
            ]
            for variant in dict.fromkeys(variant for row in rows.values() for variant in row)
        }
        picture = report.bars(list(rows), series, y=f"TFLOP/s, {pass_name}", digits=None)
        path.with_suffix(f".{pass_name}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
