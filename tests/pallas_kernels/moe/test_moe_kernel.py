"""The kernels against the reference: simulated with race detection, and compiled on a GPU."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import moe_cases as cases
import numpy as np
import pytest
from simulated_moe import residuals, value_and_gradients

from pallas_kernels._testing import simulate
from pallas_kernels.moe import MoeConfig, moe_ffn, ref, saved_bytes
from pallas_kernels.moe.api import filled_up
from pallas_kernels.moe.chunks import Chunks
from pallas_kernels.moe.config import kernel_problem
from pallas_kernels.moe.dispatch import group_tiles, moe_dispatch
from pallas_kernels.moe.groups import TILE_ROWS
from pallas_kernels.moe.parts import num_products, split, step_of
from pallas_kernels.moe.workloads import WORKLOADS

FORWARD = "pallas_kernels.moe.mosaic_gpu:forward"
BACKWARD = "pallas_kernels.moe.mosaic_gpu_vjp:backward"
CONFIG = MoeConfig(programs=2, shared_tiles=2)
EXPERTS = 4
BIASES = ("b_gate", "b_up", "b_down")


def routing(name, rng):
    """Expert ids [T, 2] of four experts."""
    if name == "empty":  # one expert without tokens; groups of odd sizes
        return rng.permuted(np.tile([0, 1, 3], (75, 1)), axis=1)[:, :2]
    if name == "one takes all":  # the second slot of most tokens is routed nowhere
        ids = np.full((150, 2), [2, -1])
        ids[::40, 1] = 4
        return ids
    assert name == "whole tiles"  # no row of any tile is empty
    return np.repeat(rng.permuted([[0, 1], [1, 3]], axis=1), 128, axis=0)


def arguments(name, *, width=128, hidden=128, activation="swiglu", bias=False, seed=0):
    """x, ids, gates and experts; gates of unrouted pairs are NaN."""
    rng = np.random.default_rng(seed)
    ids = routing(name, rng).astype(np.int32)

    def normal(*shape, scale=1.0):
        return np.asarray(scale * rng.standard_normal(shape), jnp.bfloat16)

    x = normal(ids.shape[0], width)
    gates = rng.random(ids.shape, np.float32)
    unrouted = (ids < 0) | (ids >= EXPERTS)
    gates[unrouted] = np.nan
    inner = (EXPERTS, width, hidden)
    w_gate, w_up = (normal(*inner, scale=width**-0.5) for _ in range(2))
    w_down = normal(EXPERTS, hidden, width, scale=hidden**-0.5)
    b_gate, b_up, b_down = (
        normal(EXPERTS, size) if bias else None for size in (hidden, hidden, width)
    )
    if activation == "silu":
        w_gate = b_gate = None
    return x, ids, gates, ref.Experts(w_gate, w_up, w_down, b_gate, b_up, b_down)


def reference(x, ids, gates, experts, activation, keep="gate_up"):
    """y and what is kept, of f32 products of the same inputs."""
    dispatch = moe_dispatch(ids, num_experts=EXPERTS)
    gates = np.where(np.asarray(dispatch.token_index_map) < 0, 0, gates)
    return ref.forward(
        jnp.asarray(x),
        dispatch,
        jnp.asarray(gates),
        jax.tree.map(jnp.asarray, experts),
        activation=activation,
        tile_rows=64,
        keep=keep,
    )


def reference_gradient(x, ids, gates, experts, kept, dy, activation):
    """(dx, d_gates, d_experts) of `reference`."""
    dispatch = moe_dispatch(ids, num_experts=EXPERTS)
    gates = np.where(np.asarray(dispatch.token_index_map) < 0, 0, gates)
    arrays = jax.tree.map(jnp.asarray, (x, gates, experts, kept, dy))
    x, gates, experts, kept, dy = arrays
    return ref.backward(x, dispatch, gates, experts, kept, dy, activation=activation, tile_rows=64)


def close(got, want, tolerance=1e-2):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


CASES = [
    # routing, tokens of a chunk, width, hidden width, activation, biases
    ("empty", None, 128, 256, "swiglu", False),
    ("one takes all", 100, 128, 128, "geglu", True),
    ("whole tiles", None, 256, 128, "silu", True),
]


def poisoned(kept, ids):
    """Residuals of the pairs that are routed; those of the others are never written."""
    routed = np.sum((ids >= 0) & (ids < EXPERTS))
    return jax.tree.map(lambda store: np.asarray(store.at[routed:].set(np.nan)), kept)


@pytest.mark.slow
def test_simulated_forward_equals_reference_without_races():
    calls, wanted = [], []
    for name, chunk_tokens, width, hidden, activation, bias in CASES:
        args = arguments(name, width=width, hidden=hidden, activation=activation, bias=bias)
        options = {"activation": activation, "keep": "gate_up", "config": CONFIG}
        calls.append((args, options | {"chunk_tokens": chunk_tokens}))
        wanted.append(reference(*args, activation))
    results = simulate(FORWARD, calls, timeout_s=400)
    for (args, options), (y, kept), (want, want_kept) in zip(calls, results, wanted, strict=True):
        close(y, want)
        if options["chunk_tokens"] is not None:  # rows then follow the chunks' own order
            pairs = sum(store.size for store in jax.tree.leaves(kept)) // 2 // hidden_of(args)
            assert pairs == args[1].size
            continue
        assert kept[0] is None
        stores = [jax.tree.leaves(tree) for tree in (kept[1], poisoned(want_kept, args[1]))]
        for store, want in zip(*stores, strict=True):
            assert store.shape == want.shape
            routed = ~np.isnan(np.asarray(want, np.float32))
            close(np.where(routed, store, 0), np.where(routed, want, 0))


@pytest.mark.slow
def test_simulated_fetch_equals_the_gather_to_the_bit_without_races():
    """Ring, lag and barriers of the fetch over several tiles; its copies are plain loads here.

    The rows of token 0, which stand where there is no pair, are poisoned: no pair may see them.
    """
    gathered, fetched = (dataclasses.replace(CONFIG, fetch=fetch) for fetch in ("gather", "fused"))
    x, ids, gates, experts = arguments("empty", width=256, hidden=128)
    x[0], ids[0] = np.nan, -1
    # Nothing is kept: the simulator counts copies where the outbox waits for groups of them, some
    # of which are empty for a half tile without pairs, and would report a race that is none.
    how = {"activation": "swiglu", "keep": None, "chunk_tokens": None}
    case = (x, ids, np.nan_to_num(gates), experts)
    calls = [(case, how | {"config": config}) for config in (gathered, fetched)]
    want, got = simulate("simulated_moe:fetched_forward", calls, timeout_s=400)
    assert np.isfinite(np.asarray(got[0], np.float32)).all()
    np.testing.assert_array_equal(got[0], want[0])


def hidden_of(args):
    return args[3].w_up.shape[2]


@pytest.mark.slow
def test_simulated_backward_equals_reference_without_races():
    """Residuals of unrouted pairs, their gates, and all rows behind a group are poisoned."""
    calls, wanted = [], []
    for name, chunk_tokens, width, hidden, activation, bias in CASES:
        args = arguments(name, width=width, hidden=hidden, activation=activation, bias=bias)
        x, ids, gates, experts = args
        rng = np.random.default_rng(1)
        dy = np.asarray(rng.standard_normal(x.shape), jnp.bfloat16)
        _, kept = reference(x, ids, gates, experts, activation)
        # A chunk recomputes gate and up; the others take what was kept.
        given = None if chunk_tokens else Chunks(None, poisoned(kept, ids))
        calls.append(
            (
                (x, ids, gates, experts, given, dy),
                {"activation": activation, "chunk_tokens": chunk_tokens, "config": CONFIG},
            )
        )
        wanted.append(reference_gradient(x, ids, gates, experts, kept, dy, activation))
    results = simulate(BACKWARD, calls, timeout_s=400)
    for got, want in zip(results, wanted, strict=True):
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close(ours, theirs)
    for gradient in jax.tree.leaves(results[0][2]):
        assert not np.any(gradient[2]), "the expert without tokens"


@pytest.mark.slow
@pytest.mark.parametrize("save", ["gate_up", "gate_up_fp8"])
def test_simulated_op_in_chunks_equals_reference(save):
    """64, 64 and 22 tokens: what the forward pass keeps of a chunk, its backward pass reads."""
    x, ids, gates, experts = arguments("empty", bias=True)
    rng = np.random.default_rng(2)
    dy = np.asarray(rng.standard_normal(x.shape), jnp.bfloat16)
    how = {"activation": "swiglu", "save": save, "chunk_tokens": 64, "config": CONFIG}
    call = "simulated_moe:value_and_gradients"
    [(y, grads)] = simulate(call, [((x, ids, gates, experts, dy), how)], timeout_s=400)
    want, kept = reference(x, ids, gates, experts, "swiglu")
    close(y, want)
    wanted = reference_gradient(x, ids, gates, experts, kept, dy, "swiglu")
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        close(ours, theirs, 1e-2 if save == "gate_up" else 5e-2)


@pytest.mark.slow
def test_simulated_layers_under_vmap_equal_the_reference():
    x, ids, gates, _ = arguments("one takes all")
    x, ids, gates = x[:40], ids[:40], np.nan_to_num(gates[:40])
    dy = np.asarray(np.random.default_rng(2).standard_normal(x.shape), jnp.bfloat16)
    layers = [arguments("empty", seed=seed)[3] for seed in (3, 4)]
    stacked = jax.tree.map(lambda *w: np.stack(w), *layers)
    how = {"activation": "swiglu", "save": "gate_up", "chunk_tokens": None, "config": CONFIG}
    call = "simulated_moe:several_layers"
    [(y, grads)] = simulate(call, [((x, ids, gates, stacked, dy), how)], timeout_s=400)
    for n, experts in enumerate(layers):
        want, kept = reference(x, ids, gates, experts, "swiglu")
        close(y[n], want)
        wanted = reference_gradient(x, ids, gates, experts, kept, dy, "swiglu")
        for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
            close(ours[n], theirs)


F32_CASES = [
    # tokens, width, hidden width, experts, slots, activation, biases, save, tokens of a chunk
    (1, 128, 256, 8, 2, "swiglu", True, "gate_up", None),
    (70, 128, 128, 4, 3, "geglu", True, "gate_up", None),
    (64, 128, 256, 2, 2, "silu", False, "x", 32),
]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", F32_CASES, ids=str)
def test_simulated_op_in_f32_is_within_1e_4_of_float64(sizes):
    *shape, activation, bias, save, chunk_tokens = sizes
    case = cases.inputs(0, *shape, bias=bias, gated=activation != "silu")
    dy = np.random.default_rng(1).standard_normal(case["x"].shape).astype(np.float32)
    experts = ref.Experts(*(case[name] for name in cases.WEIGHTS))
    given = (case["x"], case["expert_ids"], case["gates"], experts, dy)
    how = {"activation": activation, "save": save, "chunk_tokens": chunk_tokens, "config": CONFIG}
    call = "simulated_moe:value_and_gradients"
    [(y, (dx, d_gates, d_experts))] = simulate(call, [(given, how)], timeout_s=400)
    want, grads = cases.expected(case, dy, activation)
    found = dict(zip(cases.WEIGHTS, d_experts, strict=True)) | {"x": dx, "gates": d_gates}
    for ours, theirs in [(y, want)] + [(found[name], grads[name]) for name in grads]:
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_parts_of_f32_are_the_value():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 8)) * 2.0 ** rng.integers(-90, 120, (64, 8))
    values = values.astype(np.float32)
    parts = np.split(np.asarray(jax.jit(split)(values), np.float64), 3, axis=1)
    np.testing.assert_array_equal(sum(parts), values)
    for high, low in itertools.pairwise(parts):
        assert (np.abs(low) <= 2.0**-8 * np.abs(high)).all()
    bf16 = jnp.asarray(values, jnp.bfloat16)
    assert split(bf16) is bf16


def test_steps_multiply_every_part_but_the_smallest_and_in_the_order_of_size():
    steps = [tuple(map(int, step_of(n, 2, 3))) for n in range(2 * num_products(3))]
    assert sorted(steps) == [(a, b, c) for a in (0, 1) for b in range(3) for c in range(3 - b)]
    sizes = [left + right for _, left, right in steps]
    assert sizes == sorted(sizes, reverse=True)
    assert [step_of(n, 2, 1) for n in range(2)] == [(0, 0, 0), (1, 0, 0)]


@pytest.mark.parametrize("save", ["gate_up", "gate_up_fp8", "x"])
@pytest.mark.parametrize("chunk_tokens", [None, 64])
@pytest.mark.parametrize(
    ("activation", "dtype"), [("swiglu", "bfloat16"), ("silu", "bfloat16"), ("swiglu", "float32")]
)
def test_kept_bytes_are_the_formula(save, chunk_tokens, activation, dtype):
    x, ids, gates, experts = arguments("empty", activation=activation)
    x = x.astype(dtype)
    how = {"activation": activation, "save": save, "chunk_tokens": chunk_tokens, "config": CONFIG}
    run = functools.partial(residuals, **how)
    _, pull = jax.eval_shape(run, x, ids, np.nan_to_num(gates), experts)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    weights = sum(weight.nbytes for weight in jax.tree.leaves(experts))
    (tokens, width), hidden = x.shape, experts.w_up.shape[2]
    sizes = (tokens, width, hidden, ids.shape[1])
    how = {"save": save, "activation": activation, "itemsize": x.dtype.itemsize}
    assert kept - weights == saved_bytes(*sizes, **how)


def test_unsupported_calls_are_explained(monkeypatch):
    assert "x is float16" in (kernel_problem(jax.ShapeDtypeStruct((64, 128), jnp.float16)) or "")
    for dtype in (jnp.float32, jnp.bfloat16):
        assert kernel_problem(jax.ShapeDtypeStruct((1, 100), dtype)) is None
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"MoeConfig\.fetch is 'tma'"):
        MoeConfig(fetch="tma")  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "silu"])
def test_filling_up_changes_nothing(activation):
    """What the kernels get for other widths, against the arguments as they are."""
    x, ids, gates, experts = arguments(
        "empty", width=24, hidden=40, activation=activation, bias=True
    )
    gates = jnp.nan_to_num(jnp.asarray(gates))

    def total(x, gates, experts, filled):
        wide_experts: Any
        wide, wide_experts = filled_up(x, experts) if filled else (x, experts)
        assert wide.shape[1] == (128 if filled else 24)
        assert wide_experts.w_down.shape[1:] == ((128, 128) if filled else (40, 24))
        y = moe_ffn(
            wide,
            ids,
            gates,
            *wide_experts[:3],
            **dict(zip(BIASES, wide_experts[3:], strict=True)),
            activation=activation,
        )
        return jnp.vdot(y[:, :24], x), (y[:, :24], y[:, 24:].any())

    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, gates, experts))
    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    plain, filled = (gradient(*arrays, filled) for filled in (False, True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(filled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert not filled[0][1][1]


def test_workload_arrays_have_the_announced_shapes():
    workload = WORKLOADS["tiny"]
    arrays = workload.arrays(0)
    for array, shape, again in zip(arrays, workload.shapes(), workload.arrays(0), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        np.testing.assert_array_equal(array, again)
    y, *gradients = workload.gradient(*map(jnp.asarray, arrays))
    assert y.shape == arrays[0].shape
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in (y, *gradients))
    assert workload.floor_flops() == 6 * 160 * 128 * 128


@pytest.mark.parametrize("name", ["conf1", "conf7", "sonic_7b", "sonic_7b_skewed", "gh200"])
def test_tiles_are_nearly_full(name):
    """Rows that are computed, against pairs: what padding adds to every product."""
    workload = dataclasses.replace(WORKLOADS[name], width=1, hidden=1)
    _, ids, *_ = workload.arrays(0)
    dispatch = moe_dispatch(ids, num_experts=workload.num_experts)
    tiles = group_tiles(dispatch.expert_token_offsets, ids.size, TILE_ROWS)
    rows = TILE_ROWS * int(tiles.used)
    assert ids.size <= rows <= 1.05 * ids.size
    assert rows <= workload.rows_bound()
    assert int(jnp.sum(tiles.size)) == ids.size


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
class TestOnGpu:
    @pytest.mark.parametrize("name", ["empty", "one takes all", "whole tiles"])
    @pytest.mark.parametrize("save", ["gate_up", "gate_up_fp8", "x"])
    @pytest.mark.parametrize("chunk_tokens", [None, 64])
    def test_equals_reference(self, name, save, chunk_tokens):
        x, ids, gates, experts = jax.tree.map(jnp.asarray, arguments(name, width=512, hidden=384))
        gates = jnp.where(jnp.isnan(gates), 0, gates)
        dy = jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype)

        def run(backend):
            def op(x, gates, *weights):
                return moe_ffn(
                    x, ids, gates, *weights, save=save, chunk_tokens=chunk_tokens, backend=backend
                )

            y, pull = jax.vjp(op, x, gates, *experts[:3])
            return y, *pull(dy)

        compiled = jax.jit(run, static_argnums=0)
        first, second = compiled("mosaic_gpu"), compiled("mosaic_gpu")
        for got, again, want in zip(first, second, run("xla"), strict=True):
            np.testing.assert_array_equal(got, again)
            close(got, want, 5e-2 if save == "gate_up_fp8" else 2e-2)

    @pytest.mark.parametrize("name", ["empty", "one takes all", "whole tiles"])
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    def test_fetched_rows_give_the_bits_of_gathered_ones(self, name, dtype):
        x, ids, gates, experts = jax.tree.map(jnp.asarray, arguments(name, width=384, hidden=640))
        x, gates = x.astype(dtype), jnp.nan_to_num(gates)

        def run(fetch):
            weights, config = experts[:3], MoeConfig(fetch=fetch)
            return moe_ffn(x, ids, gates, *weights, backend="mosaic_gpu", config=config)

        compiled = jax.jit(run, static_argnums=0)
        np.testing.assert_array_equal(compiled("fused"), compiled("gather"))

    @pytest.mark.parametrize("tokens", [1, 256, 512])
    @pytest.mark.parametrize("width", [100, 128, 256, 512, 600])
    @pytest.mark.parametrize("slots", [2, 3, 4])
    @pytest.mark.parametrize("bias", [False, True])
    def test_f32_is_within_1e_4_of_float64(self, tokens, width, slots, bias):
        case = cases.published(0, tokens, width, slots, bias=bias)
        dy = np.random.default_rng(1).standard_normal(case["x"].shape).astype(np.float32)
        want, grads = cases.expected(case, dy)
        ids = case.pop("expert_ids")
        arrays = {name: jnp.asarray(value) for name, value in case.items() if value is not None}

        @jax.jit
        def run(arrays):
            return jax.vjp(lambda a: moe_ffn(expert_ids=ids, backend="mosaic_gpu", **a), arrays)

        y, pull = run(arrays)
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-4)
        for name, ours in pull(jnp.asarray(dy))[0].items():
            np.testing.assert_allclose(ours, grads[name], rtol=0, atol=1e-4)

    def test_every_pattern_of_empty_experts(self):
        case = cases.inputs(0, 256, 128, 128, 8, 1)
        del case["expert_ids"]
        arrays = {k: jnp.asarray(v, jnp.bfloat16) for k, v in case.items() if v is not None}

        @functools.partial(jax.jit, static_argnames="backend")
        def run(ids, backend):
            y, pull = jax.vjp(lambda a: moe_ffn(expert_ids=ids, backend=backend, **a), arrays)
            return y, pull(arrays["x"])[0]

        for used in itertools.product([False, True], repeat=8):
            chosen = np.flatnonzero(used) if any(used) else np.array([-1])
            ids = jnp.asarray(chosen[np.arange(256) % chosen.size][:, None], jnp.int32)
            (y, grads), want = run(ids, "mosaic_gpu"), run(ids, "xla")
            jax.tree.map(lambda a, b: close(a, b, 2e-2), (y, grads), want)
            for name in ("w_gate", "w_up", "w_down"):
                assert not np.asarray(grads[name], np.float32)[~np.array(used)].any()

    @pytest.mark.parametrize("activation", ["swiglu", "geglu", "silu"])
    def test_activations_and_biases(self, activation):
        x, ids, gates, experts = jax.tree.map(
            jnp.asarray, arguments("empty", width=384, activation=activation, bias=True)
        )
        how = {"activation": activation, "save": "gate_up", "chunk_tokens": None}
        dy = jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype)
        y, grads = value_and_gradients(x, ids, gates, experts, dy, config=MoeConfig(), **how)
        want, kept = reference(x, ids, gates, experts, activation)
        close(y, want, 2e-2)
        wanted = reference_gradient(x, ids, gates, experts, kept, dy, activation)
        for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
            close(ours, theirs, 2e-2)

    @pytest.mark.parametrize("name", ["gh200", "sonic_7b_skewed"])
    def test_workloads_run_the_kernels(self, name):
        workload = WORKLOADS[name]
        arrays = [jax.device_put(array) for array in workload.arrays(0)]
        compiled = jax.jit(workload.gradient).lower(*arrays).compile()
        assert "moe_project_gradient_mosaic_gpu" in (compiled.as_text() or "")
        for got, want in zip(
            compiled(*arrays), workload.gradient(*arrays, backend="xla"), strict=True
        ):
            close(got, want, 2e-2)
