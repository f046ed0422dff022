"""Configuration checks, building blocks, and each model against its formula."""

from dataclasses import FrozenInstanceError

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import HSTUS, SASREC, build, pack

from jaxrec.nn import HSTUConfig, SASRecConfig
from jaxrec.nn.layers import ItemEmbedding, LayerNorm, Linear
from jaxrec.nn.sasrec import low_pass_taps


@pytest.mark.parametrize("config", [SASRecConfig, HSTUConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 0}, "num_items is 0; expected 1 or more"),
        ({"max_len": 0}, "max_len is 0"),
        ({"width": -8}, "width is -8"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"width": 10, "num_heads": 4}, "width 10 does not divide into num_heads=4"),
        ({"dropout": 1.0}, "dropout is 1.0; expected 0 or more, below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
    ids=str,
)
def test_both_configurations_are_checked(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**{"num_items": 5} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn_factor": 0}, "ffn_factor is 0"),
        ({"filter_share": 1.2}, "filter_share is 1.2; expected 0 or more, at most 1"),
        ({"filter_share": 0.1, "filter_cutoff": 0}, "filter_cutoff is 0; expected 1 to 26"),
        ({"filter_share": 0.1, "filter_cutoff": 27}, "filter_cutoff is 27"),
    ],
    ids=str,
)
def test_sasrec_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        SASRecConfig(num_items=5, **options)


@pytest.mark.parametrize(
    ("config", "field", "choices"),
    [
        (SASRecConfig(5), "positions", "'start' or 'end'"),
        (SASRecConfig(5), "compute_dtype", "'float32' or 'bfloat16'"),
        (HSTUConfig(5), "compute_dtype", "'float32' or 'bfloat16'"),
    ],
)
def test_unknown_choices(config, field, choices):
    """Set behind the back of the type checker that only tests have."""
    object.__setattr__(config, field, "middle")
    with pytest.raises(ValueError, match=f"{field} is 'middle'; expected {choices}"):
        config.__post_init__()


def test_hstu_configuration():
    with pytest.raises(ValueError, match="time_buckets is -1; expected 0 or more"):
        HSTUConfig(num_items=5, time_buckets=-1)
    with pytest.raises(ValueError, match="v_width is 0"):
        HSTUConfig(num_items=5, v_width=0)
    HSTUConfig(num_items=5, width=10, num_heads=4, qk_width=3, v_width=2)
    with pytest.raises(ValueError, match="does not divide"):
        HSTUConfig(num_items=5, width=10, num_heads=4, qk_width=3)
    with pytest.raises(FrozenInstanceError):
        HSTUConfig(num_items=5).width = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("max_len", "cutoff"), [(1, 1), (9, 3), (9, 5), (10, 1), (10, 6)])
def test_low_pass_taps_are_the_inverse_transform_of_the_kept_band(max_len, cutoff):
    kept = np.arange(max_len // 2 + 1) < cutoff
    np.testing.assert_allclose(
        low_pass_taps(max_len, cutoff), np.fft.irfft(kept, n=max_len), atol=1e-12
    )


def test_linear_computes_in_the_dtype_of_its_input():
    linear = Linear(3, 2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    assert linear.bias is not None
    linear.bias[...] = jnp.asarray([1.0, -2.0])
    expected = x @ np.asarray(linear.kernel[...]) + [1, -2]
    np.testing.assert_allclose(linear(jnp.asarray(x)), expected, atol=1e-6)
    assert linear(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    assert linear.kernel[...].dtype == jnp.float32
    assert Linear(3, 2, rngs=nnx.Rngs(0), bias=False).bias is None


def test_layer_norm_starts_without_scale_or_shift():
    x = jnp.asarray(np.random.default_rng(1).normal(3, 2, size=(6, 8)), jnp.float32)
    normed = np.asarray(LayerNorm(8)(x))
    np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(normed.std(-1), 1, atol=1e-5)


def test_padding_reads_as_zeros_even_if_its_row_is_not():
    items = ItemEmbedding(4, 3, rngs=nnx.Rngs(0))
    assert not np.asarray(items.table[...][0]).any()
    items.table[...] = items.table[...].at[0].set(7.0)
    rows = np.asarray(items(jnp.asarray([[0, 2], [4, 0]])))
    assert not rows[0, 0].any()
    assert not rows[1, 1].any()
    np.testing.assert_array_equal(rows[0, 1], items.table[...][2])


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x, eps=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def leaves64(model):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))


def test_hstu_equals_its_formula():
    config = HSTUS["hstu-time7-absoluteTrue"]
    model = build(config)
    batch = pack([[3, 1, 4, 1, 5]], num_tokens=8, num_sequences=2)
    p, times = leaves64(model), batch.timestamps[:5].astype(np.int64)
    x = p["items"]["table"][batch.item_ids[:5]] * np.sqrt(8) + p["positions"][:5]
    distance = np.arange(5)[:, None] - np.arange(5)
    elapsed = np.abs(times[:, None] - times)
    bucket = np.minimum(np.floor(2 * np.log2(1 + elapsed)), 6).astype(int)
    for block in (p["blocks"][i] for i in range(2)):
        mixed = silu(norm(x) @ block["uvqk"]["kernel"])
        u, v, q, k = np.split(mixed, [8, 16, 22], axis=-1)
        q, k, v = (part.reshape(5, 2, -1) for part in (q, k, v))
        scores = np.einsum("thd,shd->hts", q, k)
        scores += block["position_bias"][:, np.maximum(distance, 0)]
        scores += block["time_bias"][:, bucket]
        weights = np.where(distance >= 0, silu(scores), 0) / config.max_len
        attended = np.einsum("hts,shd->thd", weights, v).reshape(5, -1)
        x = x + (norm(attended) * u) @ block["out"]["kernel"]
    np.testing.assert_allclose(nnx.jit(lambda m: m.encode(batch))(model)[:5], norm(x), atol=1e-4)


def test_sasrec_equals_its_formula():
    config = SASREC["sasrec-filter0.3-start"]
    model = build(config)
    batch = pack([[3, 1, 4, 1, 5]], num_tokens=8, num_sequences=2)
    p = leaves64(model)
    x = norm(p["items"]["table"][batch.item_ids[:5]] + p["positions"][:5])
    for block in (p["blocks"][i] for i in range(2)):
        qkv = (x @ block["attention"]["qkv"]["kernel"]).reshape(5, 3, 2, 4)
        scores = np.einsum("thd,shd->hts", qkv[:, 0], qkv[:, 1]) / 2
        weights = np.where(np.tri(5, dtype=bool), np.exp(scores), 0)
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hts,shd->thd", weights, qkv[:, 2]).reshape(5, 8)
        attended = norm(x + attended @ block["attention"]["out"]["kernel"])
        taps, gain = block["filter"]["taps"], block["filter"]["gain"]
        low = np.stack([sum(taps[n] * x[t - n] for n in range(t + 1)) for t in range(5)])
        filtered = norm(x + low + gain**2 * (x - low))
        mixed = 0.7 * attended + 0.3 * filtered
        hidden = mixed @ block["up"]["kernel"]
        hidden = np.asarray(jax.nn.gelu(jnp.asarray(hidden)))
        x = norm(mixed + hidden @ block["down"]["kernel"])
    np.testing.assert_allclose(nnx.jit(lambda m: m.encode(batch))(model)[:5], x, atol=1e-4)
