"""OverArchs against plain NumPy, and what every implementation promises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.nn import (
    AttentionOverArch,
    AttentionOverArchConfig,
    MixtureOfLogits,
    MixtureOfLogitsConfig,
    MLPOverArch,
    MLPOverArchConfig,
    overarch,
)
from jaxrec.ops.overarch import candidate_attention, l2_normalise

D, V, M, K0 = 6, 20, 3, 9


def mixture(**kwargs):
    config = MixtureOfLogitsConfig(
        D, query_components=3, item_components=2, component_width=4, gate_hidden=5, scale=0.7,
        **kwargs,
    )  # fmt: skip
    return MixtureOfLogits(config, rngs=nnx.Rngs(1))


def mlp(**kwargs):
    return MLPOverArch(MLPOverArchConfig(D, (8, 4), scale=0.7, **kwargs), rngs=nnx.Rngs(1))


def attention(**kwargs):
    config = AttentionOverArchConfig(D, hidden=8, num_heads=2, num_blocks=2, scale=0.7, **kwargs)
    return AttentionOverArch(config, rngs=nnx.Rngs(1))


EVERY = [mixture, mlp, attention]


def case(seed=0, valid_share=0.7):
    rng = np.random.default_rng(seed)
    query = jnp.asarray(rng.normal(size=(M, D)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    ids = rng.integers(0, V, (M, K0))
    return query, table, ids, jnp.asarray(rng.random((M, K0)) < valid_share)


def score(model, query, table, ids, valid):
    static = nnx.graphdef(model), overarch.CANDIDATE_CHUNK
    return _score(static, nnx.state(model), query, table, jnp.asarray(ids), valid)


@partial(jax.jit, static_argnums=0)
def _score(static, params, query, table, ids, valid):
    structure, _ = static
    model = nnx.merge(structure, params)
    rows = jax.tree.map(lambda column: column[ids], model.item_components(table))
    return model(query, rows, valid)


def silu(x):
    return x / (1 + np.exp(-x))


def mixture_in_numpy(model, query, table, ids):
    """The formula, pair by pair, in float64."""
    weights = {
        name: np.asarray(getattr(model, name)[...], np.float64)
        for name in ("cross_up", "cross_bias", "cross_down")
    }

    def linear(layer, x):
        bias = 0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
        return x @ np.asarray(layer.kernel[...], np.float64) + bias

    def parts(layer, x):
        rows = linear(layer, x).reshape(-1, model.config.component_width)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def gate(network, x):
        return linear(network.down, silu(linear(network.up, x)))

    out = np.zeros(ids.shape)
    for m, c in np.ndindex(ids.shape):
        q, x = np.asarray(query[m], np.float64), np.asarray(table[ids[m, c]], np.float64)
        pairs = parts(model.query_parts, q) @ parts(model.item_parts, x).T
        logits = pairs.reshape(-1) / model.config.temperature
        cross = silu(logits @ weights["cross_up"] + weights["cross_bias"]) @ weights["cross_down"]
        mixing = np.exp(silu(gate(model.query_gate, q) * gate(model.item_gate, x) + cross))
        out[m, c] = 0.7 * (mixing / mixing.sum()) @ logits + q @ x
    return out


def test_mixture_of_logits_is_its_formula():
    query, table, ids, _ = case()
    model = mixture()
    got = score(model, query, table, ids, jnp.ones(ids.shape, bool))
    np.testing.assert_allclose(
        got, mixture_in_numpy(model, query, table, ids), rtol=2e-4, atol=1e-4
    )


def test_own_components_belong_to_their_item_alone():
    query, table, ids, valid = case()
    model = mixture(own_components=2, num_items=V - 1)
    before = score(model, query, table, ids, valid)
    changed = ids[0, 0]
    assert model.own_parts is not None
    model.own_parts[...] = model.own_parts[...].at[changed].add(1.0)
    differs = np.asarray(before != score(model, query, table, ids, valid))
    np.testing.assert_array_equal(differs, (ids == changed) & np.asarray(valid))
    with pytest.raises(ValueError, match="own components of 19 items"):
        model.item_components(table[:-1])


@pytest.mark.parametrize("make", EVERY)
def test_invalid_candidates_score_minus_infinity_and_influence_none(make):
    query, table, ids, valid = case()
    model = make()
    before = score(model, query, table, ids, valid)
    np.testing.assert_array_equal(np.isneginf(before), ~np.asarray(valid))
    other = np.where(valid, ids, (ids + 7) % V)
    np.testing.assert_array_equal(before, score(model, query, table, other, valid))


@pytest.mark.parametrize("make", EVERY)
def test_order_of_candidates_does_not_matter(make):
    query, table, ids, valid = case()
    order = np.random.default_rng(1).permutation(K0)
    model = make()
    straight = score(model, query, table, ids, valid)[:, order]
    permuted = score(model, query, table, ids[:, order], valid[:, order])
    np.testing.assert_allclose(straight, permuted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", EVERY)
def test_shared_candidates_score_as_repeated_ones(make):
    query, table, ids, valid = case()
    model = make()
    shared = score(model, query, table, ids[:1], valid)
    repeated = score(model, query, table, np.tile(ids[:1], (M, 1)), valid)
    np.testing.assert_allclose(shared, repeated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", EVERY)
def test_one_query_a_task_gives_one_score_a_task(make):
    query, table, ids, valid = case()
    model = make()
    both = score(model, jnp.stack([query, -query], axis=1), table, ids, valid)
    assert both.shape == (M, K0, 2)
    for task, one in enumerate((query, -query)):
        alone = score(model, one, table, ids, valid)
        np.testing.assert_allclose(both[..., task], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", EVERY)
def test_scale_zero_is_the_dot_product(make):
    query, table, ids, valid = case()
    model = make()
    model.scale[...] = jnp.zeros(())
    dots = np.einsum("md,mkd->mk", query, np.asarray(table)[ids])
    got = np.where(valid, score(model, query, table, ids, valid), dots)
    np.testing.assert_allclose(got, dots, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", EVERY)
def test_chunks_of_candidates_give_the_same_scores(make, monkeypatch):
    query, table, ids, valid = case()
    model = make()
    whole = score(model, query, table, ids, valid)
    monkeypatch.setattr(overarch, "CANDIDATE_CHUNK", 4)
    np.testing.assert_allclose(score(model, query, table, ids, valid), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", EVERY)
def test_every_parameter_is_trained_and_gradients_are_finite(make):
    query, table, ids, valid = case()
    graphdef, params = nnx.split(make())

    def loss(params, table):
        scores = score(nnx.merge(graphdef, params), query, table, ids, valid)
        return jnp.where(valid, scores, 0).var()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, table.at[0].set(0))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("max_scores", [1, 40, 1 << 20])
def test_candidate_attention_is_masked_softmax_attention(max_scores):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(M, K0, 2, 4)), jnp.float32) for _ in range(3))
    valid = jnp.asarray(rng.random((M, K0)) < 0.5).at[1].set(False)
    got = candidate_attention(q, k, v, valid, max_scores=max_scores)
    expected = np.zeros(q.shape)
    for m, c, h in np.ndindex(M, K0, 2):
        seen = np.flatnonzero(valid[m])
        logits = np.asarray(k[m, seen, h], np.float64) @ np.asarray(q[m, c, h], np.float64) / 2
        weights = np.exp(logits)
        if len(seen):
            expected[m, c, h] = weights @ np.asarray(v[m, seen, h]) / weights.sum()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_attention_over_many_candidates_keeps_few_scores():
    model = attention()
    many = 10_000
    rows = jax.eval_shape(model.item_components, jax.ShapeDtypeStruct((many, D), jnp.float32))
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), rows)
    query, valid = jnp.zeros((1, D)), jax.ShapeDtypeStruct((1, many), bool)
    compiled = jax.jit(model.__call__).lower(query, rows, valid).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 200e6  # all scores of one block would be 800 MB


def test_normalising_zeros_is_zero_with_finite_gradients():
    grad = jax.grad(lambda x: l2_normalise(x).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(l2_normalise(jnp.zeros((2, 3))), 0)
    np.testing.assert_allclose(l2_normalise(jnp.asarray([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureOfLogitsConfig(D, item_components=0), "no item_components"),
        (lambda: MixtureOfLogitsConfig(D, own_components=1), "give both or neither"),
        (lambda: MixtureOfLogitsConfig(D, temperature=0.0), "above 0"),
        (lambda: MLPOverArchConfig(D, ()), "expected sizes above 0"),
        (lambda: AttentionOverArchConfig(D, hidden=5, num_heads=2), "does not divide"),
        (lambda: mlp().item_components(jnp.zeros((V, D + 1))), "built for width 6"),
    ],
)
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_base_class_stands_for_no_over_arch():
    with pytest.raises(TypeError, match="abstract methods '_components', '_score'"):
        overarch.ResidualOverArch(MLPOverArchConfig(D))  # type: ignore[abstract]
