"""The op equals a float64 loop over experts, with gradients, and keeps what it promises."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import moe_cases as cases
import numpy as np
import pytest
from moe_cases import DIFFERENTIABLE

from pallas_kernels import BackendError, moe_ffn, moe_saved_bytes
from pallas_kernels.moe import MoeConfig

SAVES: Any = ("gate_up", "x", "gate_up_fp8")


def ffn(case, **options):
    arrays = {k: None if v is None else jnp.asarray(v) for k, v in case.items()}
    return jax.jit(lambda arrays: moe_ffn(**arrays, **options))(arrays)


@partial(jax.jit, static_argnames=("options",))
def _value_and_gradients(learned, ids, dy, options):
    missing = {name: None for name in DIFFERENTIABLE if name not in learned}

    def total(learned):
        y = moe_ffn(expert_ids=ids, **learned, **missing, **dict(options))
        return jnp.sum(y.astype(jnp.float32) * dy), y

    (_, y), grads = jax.value_and_grad(total, has_aux=True)(learned)
    return y, grads


def value_and_gradients(case, dy, dtype=np.float32, **options):
    learned = {
        name: jnp.asarray(case[name], jnp.float32 if name == "gates" else dtype)
        for name in DIFFERENTIABLE
        if case[name] is not None
    }
    return _value_and_gradients(learned, case["expert_ids"], dy, tuple(options.items()))


def cotangent(case, seed=99):
    return np.random.default_rng(seed).standard_normal(case["x"].shape).astype(np.float32)


def check(case, *, atol=1e-4, relative=False, dtype=np.float32, activation="swiglu", **options):
    dy = cotangent(case)
    y, grads = value_and_gradients(case, dy, dtype, activation=activation, **options)
    wanted_y, wanted = cases.expected(case, dy, activation)
    np.testing.assert_allclose(np.float64(y), wanted_y, rtol=atol * relative, atol=atol)
    for name, grad in grads.items():
        scale = max(1, np.abs(wanted[name]).max()) if relative else 1
        np.testing.assert_allclose(np.float64(grad), wanted[name], atol=atol * scale, err_msg=name)
    return y, grads


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "width", "slots"),
    [(1, 100, 2), (256, 128, 3), (256, 100, 4), (512, 256, 2), (64, 512, 4), (32, 600, 3)],
)
def test_equals_the_loop_over_experts(tokens, width, slots, bias):
    check(cases.inputs(0, tokens, width, 4 * width // slots, 8, slots, bias=bias))


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 256, 512])
@pytest.mark.parametrize("width", [100, 128, 256, 512, 600])
@pytest.mark.parametrize("slots", [2, 3, 4])
def test_equals_the_loop_on_the_published_grid(tokens, width, slots, bias):
    check(cases.published(1, tokens, width, slots, bias=bias))  # 1e-4, whatever the values


@pytest.mark.parametrize("activation", ["geglu", "silu"])
@pytest.mark.parametrize("save", SAVES[:2])
def test_activations(activation, save):
    case = cases.inputs(2, 50, 24, 40, 5, 2, bias=True, gated=activation != "silu")
    check(case, activation=activation, save=save)


@pytest.mark.parametrize("save", SAVES[:2])
def test_bf16(save):
    case = cases.inputs(3, 96, 64, 48, 4, 2, bias=True)
    rounded = {
        k: v if v is None or k in ("expert_ids", "gates") else v.astype(jnp.bfloat16)
        for k, v in case.items()
    }
    check(rounded, dtype=jnp.bfloat16, atol=2e-2, relative=True, save=save)


def test_fp8_storage_is_close():
    case = cases.inputs(4, 128, 64, 48, 4, 2)
    y, grads = check(case, save="gate_up_fp8", atol=8e-2, relative=True)
    exact, _ = value_and_gradients(case, cotangent(case), save="gate_up")
    np.testing.assert_array_equal(y, exact)
    assert all(np.isfinite(g).all() for g in grads.values())


def test_policies_agree_and_calls_repeat_bitwise():
    case = cases.inputs(5, 70, 32, 24, 6, 3, bias=True)
    kept = value_and_gradients(case, cotangent(case), save="gate_up")
    again = value_and_gradients(case, cotangent(case), save="x")
    repeated = value_and_gradients(case, cotangent(case), save="x")
    for a, b, c in zip(*map(jax.tree.leaves, (kept, again, repeated)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(b, c)


@pytest.mark.parametrize("tile_rows", [1, 7, 64, 1000])
def test_tiles_do_not_show(tile_rows):
    check(cases.inputs(6, 60, 16, 12, 5, 2, bias=True), config=MoeConfig(tile_rows))


def test_every_pattern_of_empty_experts():
    case = cases.inputs(7, 24, 8, 8, 8, 1)
    dy = cotangent(case)
    for used in itertools.product([False, True], repeat=8):
        chosen = np.flatnonzero(used) if any(used) else np.array([-1])  # or nobody is routed
        ids = chosen[np.arange(24) % chosen.size][:, None].astype(np.int32)
        _, grads = value_and_gradients(case | {"expert_ids": ids}, dy)
        _, wanted = cases.expected(case | {"expert_ids": ids}, dy)
        for name in ("w_gate", "w_up", "w_down"):
            np.testing.assert_allclose(grads[name], wanted[name], atol=1e-5)
            assert not np.asarray(grads[name])[~np.array(used)].any()


def test_one_expert_takes_all_and_one_token_stands_alone():
    case = cases.inputs(8, 300, 16, 12, 8, 1)
    check(case | {"expert_ids": np.full((300, 1), 5, np.int32)})
    check(cases.inputs(9, 1, 16, 12, 8, 1))


def test_zero_and_negative_gates():
    case = cases.inputs(10, 40, 16, 12, 4, 2)
    check(case | {"gates": np.where(case["gates"] < 0.5, 0, -case["gates"]).astype(np.float32)})


def test_an_expert_named_twice_counts_twice():
    case = cases.inputs(11, 40, 16, 12, 4, 2)
    check(case | {"expert_ids": np.repeat(case["expert_ids"][:, :1], 2, axis=1)})


def test_padding_tokens_go_nowhere_and_their_nans_stay_there():
    case = cases.inputs(12, 40, 16, 12, 4, 2, bias=True)
    padding = np.arange(40) % 3 == 0
    ids = np.where(padding[:, None], -1, case["expert_ids"])
    x = np.where(padding[:, None], np.nan, case["x"]).astype(np.float32)
    dy = cotangent(case)
    for save in SAVES[:2]:
        y, grads = value_and_gradients(case | {"expert_ids": ids, "x": x}, dy, save=save)
        kept = {k: case[k][~padding] for k in ("x", "expert_ids", "gates")}
        wanted_y, wanted = cases.expected(case | kept, dy[~padding])
        np.testing.assert_allclose(np.asarray(y)[~padding], wanted_y, atol=1e-4)
        assert not np.asarray(y)[padding].any()
        assert not np.asarray(grads["x"])[padding].any()
        for name in cases.WEIGHTS:
            np.testing.assert_allclose(grads[name], wanted[name], atol=1e-4)


def test_one_tokens_nan_reaches_no_other_token():
    case = cases.inputs(13, 40, 16, 12, 4, 2)
    case["x"][7] = np.nan
    y = np.asarray(ffn(case))
    assert np.isnan(y[7]).all()
    assert np.isfinite(np.delete(y, 7, axis=0)).all()


def test_finite_differences_through_everything():
    case = cases.inputs(14, 12, 6, 5, 3, 2, bias=True)
    rng = np.random.default_rng(0)
    dy = cotangent(case)
    _, grads = value_and_gradients(case, dy)
    for _ in range(5):
        step = {k: rng.standard_normal(case[k].shape) for k in DIFFERENTIABLE}

        def total(t, step=step):
            moved = case | {k: case[k] + t * step[k] for k in DIFFERENTIABLE}
            return (cases.expected(moved, dy)[0] * dy).sum()

        slope = (total(1e-4) - total(-1e-4)) / 2e-4
        mine = sum((np.float64(grads[k]) * step[k]).sum() for k in DIFFERENTIABLE)
        assert mine == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("activation", "bias"), [("swiglu", False), ("geglu", True), ("silu", False)]
)
@pytest.mark.parametrize("save", SAVES)
def test_what_is_kept_is_what_the_formula_says_to_the_byte(save, activation, bias, dtype):
    tokens, width, hidden, slots = 64, 32, 24, 2
    case: Any = cases.inputs(
        15, tokens, width, hidden, 8, slots, bias=bias, gated=activation != "silu"
    )
    cast: Any = {
        k: None if v is None else jnp.asarray(v, dtype if k == "x" else v.dtype)
        for k, v in case.items()
    }
    learned: Any = {k: cast[k] for k in DIFFERENTIABLE if cast[k] is not None}

    def run(learned):
        others: Any = {k: None for k in DIFFERENTIABLE if k not in learned}
        return moe_ffn(
            expert_ids=cast["expert_ids"], **learned, **others, activation=activation, save=save
        )

    kept = jax.tree.leaves(jax.vjp(run, learned)[1])
    weights = [cast[k] for k in cases.WEIGHTS if cast[k] is not None]
    # A residual that is a weight itself is no cost: it stays in memory anyway.
    extra = [a for a in kept if not any(a is w or a.shape == w.shape for w in weights)]
    assert len(kept) - len(extra) == len(weights)
    itemsize = jnp.dtype(dtype).itemsize
    wanted = moe_saved_bytes(
        tokens, width, hidden, slots, save=save, activation=activation, itemsize=itemsize
    )
    assert sum(a.nbytes for a in extra) == wanted
    assert not any(a.shape in {(tokens, slots, width), (tokens * slots, width)} for a in extra)


def test_published_formulas():
    tokens, width, hidden, slots = 10, 2048, 8192, 4
    pairs = tokens * slots
    assert moe_saved_bytes(tokens, width, hidden, slots) == tokens * 2 * width + pairs * (
        4 * hidden + 8
    )
    assert moe_saved_bytes(tokens, width, hidden, slots, save="x") == tokens * 2 * width + 8 * pairs


@pytest.mark.parametrize("save", SAVES)
def test_transients_do_not_grow_with_tokens_times_experts(save):
    width, hidden, slots, experts = 32, 16, 4, 16

    def temporary(tokens):
        def shape(*sizes, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(sizes, dtype)

        def loss(x, gates, w_gate, w_up, w_down, ids):
            return moe_ffn(x, ids, gates, w_gate, w_up, w_down, save=save).sum()

        inner, outer = shape(experts, width, hidden), shape(experts, hidden, width)
        arguments = (shape(tokens, width), shape(tokens, slots), inner, inner, outer)
        ids = shape(tokens, slots, dtype=jnp.int32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*arguments, ids).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    extra = temporary(16384) - temporary(8192)
    saved = moe_saved_bytes(8192, width, hidden, slots, save=save, itemsize=4)
    # Beside what is saved: f32 sums of y and dx, gates and index structures; no T·K rows.
    assert extra < saved + 8192 * (3 * 4 * width + 64 * slots)


def test_under_scan_remat_and_vmap():
    layers = [cases.inputs(seed, 20, 8, 6, 4, 2) for seed in range(3)]
    names = ("w_gate", "w_up", "w_down")
    stacked = {k: jnp.stack([layer[k] for layer in layers]) for k in names}
    ids, gates = layers[0]["expert_ids"], layers[0]["gates"]
    x = jnp.asarray(layers[0]["x"])

    def layer(x, weights):
        return x + moe_ffn(x, ids, gates, **weights)

    def scanned(weights):
        step = jax.checkpoint(lambda x, w: (layer(x, w), None))
        return jax.lax.scan(step, x, weights)[0].sum()

    def unrolled(weights):
        y = x
        for i in range(3):
            y = layer(y, jax.tree.map(lambda w, i=i: w[i], weights))
        return y.sum()

    got, wanted = (jax.jit(jax.grad(f))(stacked) for f in (scanned, unrolled))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, wanted)
    batched = jax.jit(jax.vmap(layer, in_axes=(None, 0)))(x, stacked)
    one = jax.jit(layer)
    for i in range(3):
        own = one(x, {k: stacked[k][i] for k in names})
        np.testing.assert_allclose(batched[i], own, atol=1e-5)


def test_under_shard_map():
    case = cases.inputs(16, 32, 8, 6, 4, 2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    names = ("w_gate", "w_up", "w_down")
    run = jax.shard_map(
        lambda x, ids, gates: moe_ffn(x, ids, gates, *(jnp.asarray(case[n]) for n in names)),
        mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False,
    )  # fmt: skip
    sharded = jax.jit(run)(case["x"], case["expert_ids"], case["gates"])
    np.testing.assert_allclose(sharded, ffn(case), atol=1e-5)


def test_no_tokens():
    case = cases.inputs(17, 0, 8, 6, 4, 2)
    y, grads = value_and_gradients(case, cotangent(case))
    assert y.shape == (0, 8)
    assert not any(np.asarray(g).any() for g in grads.values())


def test_weights_of_another_dtype_keep_it():
    case = cases.inputs(18, 20, 8, 6, 4, 2)
    _, grads = value_and_gradients(case | {"x": case["x"].astype(jnp.bfloat16)}, cotangent(case))
    assert grads["w_up"].dtype == jnp.float32
    bf16_x = jnp.asarray(case["x"], jnp.bfloat16)
    assert ffn(case | {"x": bf16_x}).dtype == jnp.bfloat16


def test_arguments_of_different_dtypes():
    """Products in the dtype of x; every gradient in that of its own argument."""
    case = cases.inputs(18, 20, 8, 6, 4, 2, bias=True)
    dtypes = {"x": "bfloat16", "gates": "bfloat16", "w_gate": "float16", "w_up": "float32"}
    dtypes |= {"w_down": "bfloat16", "b_gate": "float32", "b_up": "bfloat16", "b_down": "float32"}
    mixed: Any = {name: jnp.asarray(case[name], dtype) for name, dtype in dtypes.items()}
    ids = case["expert_ids"]

    def total(mixed, ids):
        y = moe_ffn(expert_ids=ids, **mixed)
        assert y.dtype == jnp.bfloat16
        return y.astype(jnp.float32).sum()

    grads = jax.jit(jax.grad(total))(mixed, jnp.asarray(ids, jnp.int16))
    assert {name: str(grad.dtype) for name, grad in grads.items()} == dtypes
    plain = jax.tree.map(lambda a: a.astype(jnp.float32), mixed)
    wanted = jax.jit(jax.grad(lambda m: moe_ffn(expert_ids=ids, **m).sum()))(plain)
    for name, grad in grads.items():
        scale = float(jnp.abs(wanted[name]).max())
        np.testing.assert_allclose(np.float32(grad), wanted[name], atol=3e-2 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"w_gate": None}, {}, "needs w_gate"),
        ({}, {"activation": "silu"}, "has no gate"),
        ({}, {"activation": "relu"}, "expected one of swiglu, geglu, silu"),
        ({}, {"save": "all"}, "expected one of gate_up, gate_up_fp8, x"),
        ({}, {"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"x": np.zeros((5, 8), np.float16)}, {}, "x is float16"),
        ({"x": np.zeros((4, 8), np.float32)}, {}, "x has 4 tokens"),
        ({"x": np.zeros((5, 9), np.float32)}, {}, "9 wide and w_up takes 8"),
        ({"w_down": np.zeros((4, 8, 6), np.float32)}, {}, r"w_down has shape \(4, 8, 6\)"),
        (
            {"expert_ids": np.zeros((5, 5), np.int32), "gates": np.zeros((5, 5), np.float32)},
            {},
            "5 experts a token, but only 4 exist",
        ),
    ],
)
def test_errors_say_what_was_expected(change, options, message, monkeypatch):
    # Outside of tests nothing checks the annotations: the messages must.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    case = cases.inputs(19, 5, 8, 6, 4, 2) | change
    with pytest.raises(ValueError, match=message):
        ffn(case, **options)


def test_a_named_backend_never_falls_back():
    with pytest.raises(BackendError, match="moe_ffn: backend 'mosaic_gpu' cannot run"):
        ffn(cases.inputs(20, 5, 8, 6, 4, 2), backend="mosaic_gpu")
