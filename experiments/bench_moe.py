"""Times MoE layers, forward and with gradients, beside other ways to compute the same.

    python -m experiments.bench_moe                     # a GPU: all layers, half an hour
    python -m experiments.bench_moe --workloads gh200 sonic_7b
    python -m experiments.bench_moe --small --scratch   # every layer shrunk: runs on a CPU

Ours, with each policy of what to save, with rows fetched in the kernel, and with fewer and more row
tiles that go through all columns together, beside
  materialised  gather into [E, C, D], batched products, weighted scatter; C fits the fullest expert
  ragged_dot    rows sorted by expert, `jax.lax.ragged_dot`
  tokamax       the same with tokamax's `ragged_dot`, where it is installed
  dense         products of the same FLOPs with one expert: what the machine can do

All are differentiated by JAX but ours, and compute the same (dense: as many multiply-adds). The
answers are compared first; one that differs ends the run. Saved bytes are those that `jax.vjp`
keeps besides weights, peak bytes those of the compiled program. One JSON file and plots go to
experiments/results/bench_moe/; which of our ways was the fastest, over even and skewed routing of
the same layer, goes to pallas_kernels/moe/tuned/, where `moe_ffn` looks it up (a GPU's layers at
full size only).
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
from jax import lax

from experiments import record, report
from pallas_kernels import moe_dispatch, moe_ffn
from pallas_kernels._timing import Timing, time_interleaved
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.tuning import Choice, Layer, tuned_path, write_tuned
from pallas_kernels.moe.workloads import WORKLOADS, MoeWorkload

SEED = 0
TOLERANCE = 3e-2  # of the largest value: bf16 products, summed in other orders
PASSES = ("forward", "gradient")
FETCHED = "ours, fused fetch"
GATHERED = "ours, gate_up"
USUAL = Choice()
SHARED_TILES = {2: "ours, 2 row tiles", USUAL.shared_tiles: GATHERED, 32: "ours, 32 row tiles"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer to time: a workload and its activation."""

    name: str
    workload: MoeWorkload
    activation: Literal["swiglu", "silu"] = "swiglu"

    def flops(self, pass_name: str) -> int:
        """Multiply-adds count two: 6KDH a token forward with a gate, 4KDH without; thrice both."""
        w = self.workload
        matrices = 3 if self.activation == "swiglu" else 2
        forward = 2 * matrices * w.num_pairs * w.width * w.hidden
        return forward if pass_name == "forward" else 3 * forward

    def layer(self) -> Layer:
        """As tuned choices name it."""
        w = self.workload
        gated = self.activation == "swiglu"
        return Layer(w.num_pairs, w.num_experts, w.width, w.hidden, gated)

    def arrays(self) -> tuple[Any, ...]:
        """x, expert ids, gates and weights, made on the device; w_gate is None without a gate."""
        w = self.workload
        keys = jax.random.split(jax.random.key(SEED), 6)
        popularity = -w.skew * jnp.log1p(jnp.arange(w.num_experts, dtype=jnp.float32))
        noise = jax.random.gumbel(keys[0], (w.num_tokens, w.num_experts))
        ids = lax.top_k(popularity + noise, w.slots)[1].astype(jnp.int32)
        gates = jax.random.uniform(keys[1], ids.shape, minval=0.1)

        def normal(key, fan_in, *shape):
            return jax.random.normal(key, shape, jnp.bfloat16) * fan_in**-0.5

        inner = (w.num_experts, w.width, w.hidden)
        x = normal(keys[2], 1, w.num_tokens, w.width)
        gate = normal(keys[3], w.width, *inner) if self.activation == "swiglu" else None
        up = normal(keys[4], w.width, *inner)
        down = normal(keys[5], w.hidden, inner[0], inner[2], inner[1])
        return x, ids, gates / gates.sum(1, keepdims=True), gate, up, down


def cases() -> dict[str, Case]:
    """The paper's layers with both activations, two known ones, and skewed routing."""
    paper = [name for name in WORKLOADS if name.startswith("conf")]
    found = [Case(name, WORKLOADS[name]) for name in paper]
    found += [Case(f"{name}_silu", WORKLOADS[name], "silu") for name in paper]
    found += [Case(name, WORKLOADS[name]) for name in ("gh200", "sonic_7b", "sonic_7b_skewed")]
    found += [Case("conf4_skewed", dataclasses.replace(WORKLOADS["conf4"], skew=1.0))]
    return {case.name: case for case in found}


def small(case: Case) -> Case:
    """The same routing and activation at sizes for a CPU."""
    w = case.workload
    tiny = dataclasses.replace(
        w, num_tokens=96, width=128, hidden=128, num_experts=min(w.num_experts, 8)
    )
    slots = min(w.slots, tiny.num_experts)
    return dataclasses.replace(case, workload=dataclasses.replace(tiny, slots=slots))


def _activate(activation: str, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    if gate is None:
        return jax.nn.silu(up)
    return jax.nn.silu(gate) * up


def ours(case: Case, save: Any, choice: Choice = USUAL) -> Callable[..., jax.Array]:
    """`moe_ffn` on its best backend."""
    w = case.workload
    sizes = MoeConfig.heuristic(w.num_pairs, w.num_experts)
    config = dataclasses.replace(sizes, **choice._asdict())

    def run(x, ids, gates, *weights):
        how = {"activation": case.activation, "save": save, "config": config}
        return moe_ffn(x, ids, gates, *weights, **how)

    return run


def materialised(case: Case, capacity: int) -> Callable[..., jax.Array]:
    """Every expert's rows in a buffer of its own, as long as the longest."""
    experts, width = case.workload.num_experts, case.workload.width

    def run(x, ids, gates, w_gate, w_up, w_down):
        dispatch = moe_dispatch(ids, num_experts=experts)
        first = dispatch.expert_token_offsets[:-1]
        places = ids * capacity + dispatch.token_index_map - first[ids]
        token = jnp.broadcast_to(jnp.arange(ids.shape[0])[:, None], ids.shape)
        rows = jnp.zeros((experts * capacity, width), x.dtype).at[places].set(x[token])
        rows = rows.reshape(experts, capacity, width)
        product = functools.partial(jnp.einsum, "ecd,edh->ech")
        gate = None if w_gate is None else product(rows, w_gate)
        hidden = _activate(case.activation, gate, product(rows, w_up))
        out = product(hidden, w_down).reshape(-1, width)[places]
        return jnp.sum(gates[..., None] * out, axis=1).astype(x.dtype)

    return run


def ragged(case: Case, dot: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Rows sorted by expert, and a grouped product of them."""

    def run(x, ids, gates, w_gate, w_up, w_down):
        dispatch = moe_dispatch(ids, num_experts=case.workload.num_experts)
        sizes = jnp.diff(dispatch.expert_token_offsets)
        rows = x[dispatch.expert_token_indices]
        gate = None if w_gate is None else dot(rows, w_gate, sizes)
        hidden = _activate(case.activation, gate, dot(rows, w_up, sizes))
        out = dot(hidden, w_down, sizes)[dispatch.token_index_map]
        return jnp.sum(gates[..., None] * out, axis=1).astype(x.dtype)

    return run


def dense(case: Case) -> Callable[..., jax.Array]:
    """K copies of the tokens through the first expert: the same multiply-adds, no routing."""
    slots = case.workload.slots

    def run(x, ids, gates, w_gate, w_up, w_down):
        rows = jnp.repeat(x, slots, axis=0)
        gate = None if w_gate is None else rows @ w_gate[0]
        out = _activate(case.activation, gate, rows @ w_up[0]) @ w_down[0]
        weighted = gates[..., None] * out.reshape(*ids.shape, -1)
        return jnp.sum(weighted, axis=1).astype(x.dtype)

    return run


def variants(case: Case, ids: jax.Array) -> dict[str, Callable[..., jax.Array]]:
    """Everything that computes this case here."""
    fullest = int(np.bincount(np.asarray(ids).reshape(-1)).max())
    found = {f"ours, {save}": ours(case, save) for save in ("gate_up", "gate_up_fp8", "x")}
    found[FETCHED] = ours(case, "gate_up", Choice(fetch="fused"))
    for tiles, name in SHARED_TILES.items():
        found[name] = ours(case, "gate_up", Choice(shared_tiles=tiles))
    found["materialised"] = materialised(case, -(-fullest // 128) * 128)
    found["ragged_dot"] = ragged(case, lax.ragged_dot)
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"{case.name}: skipped tokamax: {error}")
    else:
        found["tokamax"] = ragged(case, tokamax.ragged_dot)
    found["dense"] = dense(case)
    return found


def program(run: Callable[..., jax.Array], pass_name: str) -> Callable[..., Any]:
    """y, or y and the gradients of x, gates and weights with x as the gradient of y."""
    if pass_name == "forward":
        return run

    def gradient(x, ids, gates, *weights):
        y, pull = _pulled(run, x, ids, gates, *weights)
        return y, *pull(x)

    return gradient


def _pulled(run, x, ids, gates, *weights) -> Any:
    return jax.vjp(lambda x, gates, *w: run(x, ids, gates, *w), x, gates, *weights)


def saved_bytes(run: Callable[..., jax.Array], arrays: tuple[Any, ...]) -> int:
    """What `jax.vjp` keeps, weights excepted."""
    weights = {leaf.shape for leaf in arrays[3:] if leaf is not None}
    kept = jax.make_jaxpr(lambda *a: jax.tree.leaves(_pulled(run, *a)[1]))(*arrays).jaxpr.outvars
    avals: list[Any] = list({id(value): value.aval for value in kept}.values())
    return sum(a.size * a.dtype.itemsize for a in avals if a.shape not in weights)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One variant of one case and pass; see the module's text."""

    timing: Timing
    saved: int
    peak: int


def measure(case: Case, pass_name: str, repeats: int) -> tuple[dict[str, Measured], dict[str, Any]]:
    """Every variant that runs, and the errors of those that do, or why they do not."""
    arrays = case.arrays()
    runs = variants(case, arrays[1])
    calls: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int] = {}
    checks: dict[str, Any] = {}
    wanted: Any = None
    for name, run in runs.items():
        try:
            compiled = jax.jit(program(run, pass_name)).lower(*arrays).compile()
            answer = jax.block_until_ready(compiled(*arrays))
        except Exception as error:  # a peer that does not fit must not cost the run
            if name.startswith("ours"):
                raise
            checks[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"{case.name} {pass_name}: skipped {name}: {checks[name]}")
            continue
        wanted = answer if wanted is None else wanted
        if name != "dense":
            checks[name] = record.largest_error(answer, wanted)
            limit = 4 * TOLERANCE if "fp8" in name else TOLERANCE
            if not checks[name] < limit:
                raise SystemExit(f"{case.name} {pass_name} {name}: wrong by {checks[name]}")
        calls[name] = functools.partial(compiled, *arrays)
        peaks[name] = record.peak_bytes(compiled.memory_analysis())
    timings = time_interleaved(calls, repeats=repeats)
    saved = {name: saved_bytes(runs[name], arrays) for name in calls}
    return {n: Measured(t, saved[n], peaks[n]) for n, t in timings.items()}, checks


def main() -> None:
    """Runs the benchmark from the command line."""
    options = _options()
    if jax.default_backend() != "gpu":
        print("no GPU here: times and peak bytes are a CPU's, where ours is the XLA reference")
    chosen = {name: cases()[name] for name in options.workloads}
    if options.small:
        chosen = {name: small(case) for name, case in chosen.items()}
    print(
        f"{'layer':16} {'pass':8} {'variant':17} {'ms':>9} {'TFLOP/s':>8} {'saved MB':>9} "
        f"{'peak MB':>9}"
    )
    found: dict[tuple[str, str], dict[str, Measured]] = {}
    checks: dict[str, Any] = {}
    for name, case in chosen.items():
        for pass_name in PASSES:
            key = (name, pass_name)
            found[key], checks[" ".join(key)] = measure(case, pass_name, options.repeats)
            for variant, measured in found[key].items():
                _print_row(case, pass_name, variant, measured)
    path = record.write(
        "bench_moe",
        config={"layers": {name: dataclasses.asdict(case) for name, case in chosen.items()}},
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
    if not (options.small or options.scratch):
        choices = [(layer, best(passes)) for layer, passes in by_layer(chosen, found).items()]
        device = jax.devices()[0].device_kind
        write_tuned(tuned_path(), choices, {"result": path.name, "device": device})
        print(f"wrote {tuned_path()}")


type Passes = dict[str, dict[str, Measured]]  # by pass, then by variant


def by_layer(
    chosen: dict[str, Case], found: dict[tuple[str, str], dict[str, Measured]]
) -> dict[Layer, list[Passes]]:
    """What was measured of each layer: one `Passes` for each routing of it."""
    layers: dict[Layer, list[Passes]] = {}
    for name, case in chosen.items():
        passes = {pass_name: found[name, pass_name] for pass_name in PASSES}
        layers.setdefault(case.layer(), []).append(passes)
    return layers


def best(routings: list[Passes]) -> Choice:
    """The fastest over all routings of a layer: of the fetch forward, of the tiles with gradients.

    Each of the two is measured with the other's default.
    """

    def total(pass_name: str, variant: str) -> float:
        return sum(passes[pass_name][variant].timing.p50_us for passes in routings)

    fused = total("forward", FETCHED) < total("forward", GATHERED)
    tiles = min(SHARED_TILES, key=lambda n: total("gradient", SHARED_TILES[n]))
    return Choice("fused" if fused else "gather", tiles)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times MoE layers.")
    parser.add_argument("--workloads", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--repeats", type=int, default=10, help="samples of each variant")
    parser.add_argument("--small", action="store_true", help="shrinks every layer")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    options = parser.parse_args()
    options.small = options.small or jax.default_backend() != "gpu"
    return options


def _rate(case: Case, pass_name: str, measured: Measured) -> float:
    return case.flops(pass_name) / max(measured.timing.p50_us, 1e-9) / 1e6


def _print_row(case: Case, pass_name: str, variant: str, measured: Measured) -> None:
    print(
        f"{case.name:16} {pass_name:8} {variant:17} {measured.timing.p50_us / 1e3:9.3f} "
        f"{_rate(case, pass_name, measured):8.2f} {measured.saved / 1e6:9.2f} "
        f"{measured.peak / 1e6:9.2f}",
        flush=True,
    )


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
        {"metric": "saved", "unit": "B", **same, "value": measured.saved},
        {"metric": "peak", "unit": "B", **same, "value": measured.peak},
    ]


def plot(path: Path, chosen: dict[str, Case], found: dict[Any, dict[str, Measured]]) -> None:
    """Rates and peaks of the gradient's pass beside the result; 0 where a variant did not run."""
    rows = {name: found[name, "gradient"] for name in chosen}
    names = list(dict.fromkeys(variant for row in rows.values() for variant in row))
    figures: dict[str, tuple[str, Callable[[str, Measured], float]]] = {
        "rate": ("TFLOP/s, forward and backward", lambda n, m: _rate(chosen[n], "gradient", m)),
        "peak": ("peak GB", lambda n, m: m.peak / 1e9),
        "saved": ("saved GB", lambda n, m: m.saved / 1e9),
    }
    for suffix, (label, value) in figures.items():
        series = {
            variant: [value(n, row[variant]) if variant in row else 0.0 for n, row in rows.items()]
            for variant in names
        }
        picture = report.bars(list(rows), series, y=label, digits=None)
        path.with_suffix(f".{suffix}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
