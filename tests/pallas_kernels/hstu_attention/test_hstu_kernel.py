"""The kernels against the dense formula: simulated with race detection, and compiled on a GPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import offsets_of
from dense_hstu import dense_hstu, dense_mask

from pallas_kernels._testing import simulate
from pallas_kernels.hstu_attention import hstu_attention
from pallas_kernels.hstu_attention.biases import MAX_BUCKETS, bias_arrays, by_distance
from pallas_kernels.hstu_attention.config import HstuConfig, kernel_problem
from pallas_kernels.hstu_attention.ref import time_bucket
from pallas_kernels.hstu_attention.tiles import TILE, Mask
from pallas_kernels.hstu_attention.workloads import WORKLOADS

CONFIG = HstuConfig(programs=2)
CALL = "simulated_hstu:value_and_gradients"
BUCKETS = 20


def arguments(
    lengths,
    *,
    qk_width=64,
    v_width=64,
    heads=1,
    position=False,
    times=False,
    seed=0,
    max_len=200,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """Arrays of the op; behind the last sequence three slots hold large values."""
    rng = np.random.default_rng(seed)
    num_tokens = sum(lengths) + 3

    def normal(width):
        x = rng.standard_normal((num_tokens, heads, width))
        x[sum(lengths) :] = 1e4
        return np.asarray(x, dtype)

    table = lambda size: rng.standard_normal((heads, size)).astype(np.float32)  # noqa: E731
    return {
        "q": normal(qk_width),
        "k": normal(qk_width),
        "v": normal(v_width),
        "d_out": normal(v_width),
        "offsets": offsets_of(lengths),
        "position_bias": table(max_len) if position else None,
        "time_bias": table(BUCKETS) if times else None,
        "timestamps": rng.integers(0, 3000, num_tokens).astype(np.int32) if times else None,
        "num_targets": None,
    }


def call_of(arrays, mask=Mask(), max_len=200):  # noqa: B008
    """What `simulate` takes for `CALL`."""
    lists = (arrays["offsets"], arrays["num_targets"], arrays["timestamps"])
    names = ("q", "k", "v", "position_bias", "time_bias")
    how = (max_len, arrays["q"].shape[2] ** -0.5, mask, CONFIG)
    return (*(arrays[name] for name in names), lists, arrays["d_out"], how), {}


def expected(arrays, mask):
    """(out, gradients of q, k, v and the biases), dense and in float64 of the same inputs."""
    offsets, num_tokens = arrays["offsets"], len(arrays["q"])
    dense = dense_mask(
        offsets,
        num_tokens,
        num_targets=arrays["num_targets"],
        max_attn_len=mask.max_attn_len,
        contextual_len=mask.contextual_len,
        min_full_attn_len=mask.min_full_attn_len,
    )

    def op(q, k, v, position_bias, time_bias):
        return dense_hstu(
            jnp,
            q,
            k,
            v,
            dense,
            alpha=arrays["q"].shape[2] ** -0.5,
            scale=1.0,
            position_bias=position_bias,
            time_bias=time_bias,
            timestamps=arrays["timestamps"],
        )

    used = np.arange(num_tokens)[:, None, None] < offsets[-1]
    rows = [np.where(used, arrays[name], 0) for name in ("d_out", "q", "k", "v")]
    with jax.enable_x64(True):
        inputs = (*rows, arrays["position_bias"], arrays["time_bias"])
        d_out, *wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), inputs)
        out, pull = jax.vjp(op, *wide)
        return jax.tree.map(np.asarray, (out, *pull(d_out)))


def close(got, want, tolerance=2e-2):
    assert (got is None) == (want is None)
    if want is not None:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def close_in_f32(results, wanted):
    """The result to 2e-5, its gradients to 1e-4."""
    for n, (got, want) in enumerate(zip(results, wanted, strict=True)):
        assert (got is None) == (want is None)
        if want is not None:
            tolerance = 1e-4 if n else 2e-5
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


CASES = [
    # lengths, targets, mask, options
    ([65, 0, 1, 200, 63, 64], None, Mask(), {"v_width": 32}),
    ([65, 130], [0, 3], Mask(0, 2, 0), {"qk_width": 32, "position": True, "times": True}),
    ([200, 90], [10, 70], Mask(50, 3, 20), {"position": True, "heads": 2}),
    # So wide that the gradients' rings have one stage, and their works 64 rows.
    ([130], None, Mask(), {"qk_width": 256, "v_width": 256, "position": True, "times": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)))
def test_simulated_op_equals_the_dense_formula_without_races(case):
    lengths, targets, mask, options = CASES[case]
    arrays = arguments(lengths, **options)
    arrays["num_targets"] = None if targets is None else np.asarray(targets, np.int32)
    [results] = simulate(CALL, [call_of(arrays, mask)], timeout_s=280)
    for got, want in zip(results, expected(arrays, mask), strict=True):
        close(got, want)
    for rows in results[:4]:
        assert not np.asarray(rows[sum(lengths) :]).any(), "slots behind the last sequence"


F32_CASES = [
    ([65, 0, 1, 200, 63, 64], None, Mask(), {"v_width": 32}),
    ([65, 130], [0, 3], Mask(0, 2, 0), {"qk_width": 32, "position": True, "times": True}),
    # So wide that a program takes 64 rows at a time, and keys and values have a kernel each.
    ([70, 129], [10, 70], Mask(50, 3, 20), {"qk_width": 128, "v_width": 128, "position": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(F32_CASES)))
def test_simulated_op_in_f32_is_near_the_dense_formula_in_float64(case):
    lengths, targets, mask, options = F32_CASES[case]
    arrays = arguments(lengths, **options, dtype=np.float32)
    arrays["num_targets"] = None if targets is None else np.asarray(targets, np.int32)
    [results] = simulate(CALL, [call_of(arrays, mask)], timeout_s=280)
    close_in_f32(results, expected(arrays, mask))
    for rows in results[:4]:
        assert not rows[sum(lengths) :].any(), "slots behind the last sequence"


@pytest.mark.slow
def test_simulated_sequences_do_not_see_each_other():
    """Bit for bit: a sequence that moves, and loses its neighbours, keeps its results."""
    lengths, chosen = [70, 3, 129], [2, 0]
    arrays = arguments(lengths, times=True)
    offsets = arrays["offsets"]
    slots = np.concatenate([np.arange(offsets[b], offsets[b + 1]) for b in chosen])
    slots = np.append(slots, np.arange(offsets[-1], len(arrays["q"])))
    moved = {
        name: x[slots] if name in ("q", "k", "v", "d_out", "timestamps") else x
        for name, x in arrays.items()
    } | {"offsets": offsets_of([lengths[b] for b in chosen])}
    whole, part = simulate(CALL, [call_of(arrays), call_of(moved)], timeout_s=280)
    for ours, rows in zip(part[:4], whole[:4], strict=True):
        np.testing.assert_array_equal(ours, rows[slots])
    for got, want in zip(whole, expected(arrays, Mask()), strict=True):
        close(got, want)


@pytest.mark.slow
def test_simulated_aligned_sequences_are_read_in_place():
    """The same bits as with copies."""
    args, _ = call_of(arguments([72, 0, 128, 53]))
    in_place = (*args[:-1], (*args[-1][:-1], dataclasses.replace(CONFIG, aligned=True)))
    copied, own = simulate(CALL, [(args, {}), (in_place, {})], timeout_s=280)
    for ours, wanted in zip(own[:4], copied[:4], strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_time_buckets_that_are_never_reached_take_no_memory():
    table = np.arange(2 * 5000, dtype=np.float32).reshape(2, 5000)
    kept: Any = bias_arrays(None, jnp.zeros(8, jnp.int32), jnp.asarray(table)).table
    np.testing.assert_array_equal(kept[:, :MAX_BUCKETS], table[:, :MAX_BUCKETS] / 2)
    assert kept.shape == (2, 64)
    assert time_bucket(jnp.asarray([2**31 - 1, -(2**31)]), 5000).max() == MAX_BUCKETS - 1


def test_sums_of_tiles_go_to_their_distances():
    distances, length = 3, 160
    place = np.arange(distances * TILE)
    distance = place[:, None] - place
    values = np.random.default_rng(0).standard_normal(distance.shape)
    values *= (distance >= -20) & (distance < length)  # some look ahead
    tiles = values.reshape(distances, TILE, distances, TILE).swapaxes(1, 2)
    classes = [
        sum(tiles[i, i - n] for i in range(distances) if 0 <= i - n < distances)
        for n in (0, 1, 2, -1, -2)
    ]
    got = by_distance(jnp.asarray(np.stack(classes)[None], jnp.float32), distances)
    clipped = np.maximum(distance, 0)
    want = [values[clipped == n].sum() for n in range(distances * TILE)]
    np.testing.assert_allclose(got[0], want, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "v_width", "dtype", "problem"),
    [
        (64, 64, jnp.float16, "q is float16"),
        (128, 128, jnp.float32, None),
        (160, 128, jnp.float32, "q and v are 160 and 128 wide"),
        (50, 64, jnp.bfloat16, "heads of q are 50 wide"),
        (64, 288, jnp.bfloat16, "heads of v are 288 wide"),
        (32, 256, jnp.bfloat16, None),
    ],
)
def test_unsupported_calls_are_explained(width, v_width, dtype, problem):
    for leading in ((8, 2), (3, 8, 2)):  # packed and cached
        q, v = (jax.ShapeDtypeStruct((*leading, n), dtype) for n in (width, v_width))
        found = kernel_problem(q, q, v)
        assert found is None if problem is None else problem in (found or "")


def test_operands_of_two_dtypes_are_explained():
    q, k = (jax.ShapeDtypeStruct((8, 2, 64), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert "q is float32 and k is bfloat16" in (kernel_problem(q, k, q) or "")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
class TestOnGpu:
    @pytest.mark.parametrize("case", range(len(CASES)))
    @pytest.mark.parametrize(
        ("widths", "dtype", "tolerances"),
        [
            *[
                (widths, jnp.bfloat16, (3e-2, 3e-2))
                for widths in ((32, 64), (64, 64), (128, 128), (256, 224), (256, 256))
            ],
            *[
                (widths, jnp.float32, (2e-5, 1e-4))
                for widths in ((32, 32), (32, 96), (64, 64), (128, 128), (32, 224))
            ],
        ],
    )
    def test_equals_the_dense_formula(self, case, widths, dtype, tolerances):
        lengths, targets, mask, options = CASES[case]
        options = options | {"qk_width": widths[0], "v_width": widths[1], "dtype": dtype}
        arrays = arguments(lengths, **options)
        arrays["num_targets"] = None if targets is None else np.asarray(targets, np.int32)
        alpha = widths[0] ** -0.5
        device = jax.tree.map(jnp.asarray, arrays)

        @jax.jit
        def run(q, k, v, position_bias, time_bias, d_out):
            def op(q, k, v, position_bias, time_bias):
                return hstu_attention(
                    q,
                    k,
                    v,
                    device["offsets"],
                    max_len=200,
                    alpha=alpha,
                    attn_scale=1.0,
                    num_targets=device["num_targets"],
                    position_bias=position_bias,
                    timestamps=device["timestamps"],
                    time_bias=time_bias,
                    backend="mosaic_gpu",
                    **mask._asdict(),
                )

            out, pull = jax.vjp(op, q, k, v, position_bias, time_bias)
            return out, *pull(d_out)

        names = ("q", "k", "v", "position_bias", "time_bias", "d_out")
        first, second = (run(*(device[name] for name in names)) for _ in range(2))
        wanted = expected(arrays, mask)
        for n, (got, again, want) in enumerate(zip(first, second, wanted, strict=True)):
            if want is not None:
                np.testing.assert_array_equal(got, again)
            close(got, want, tolerances[n > 0])

    @pytest.mark.parametrize("name", ["200", "1k", "4k"])
    def test_workloads_run_the_kernels(self, name):
        workload = WORKLOADS[name]
        arrays = [jax.device_put(array) for array in workload.arrays(0)]
        compiled = jax.jit(workload.gradient).lower(*arrays).compile()
        assert "hstu_key_gradient_mosaic_gpu" in (compiled.as_text() or "")
        wanted = workload.gradient(*arrays, backend="xla")
        for got, want in zip(compiled(*arrays), wanted, strict=True):
            close(got, want, 3e-2)
