"""The layer is its router, its experts and its shared expert, and nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import nnx

from jaxrec.functional import split_params
from jaxrec.nn import MoEConfig, MoELayer, check_routers
from jaxrec.ops import routing as ops

X = jnp.asarray(np.random.default_rng(0).standard_normal((30, 8)), jnp.float32)


def layer(**options: Any) -> MoELayer:
    sizes: dict[str, Any] = {"width": 8, "num_experts": 4, "hidden": 6}
    config = MoEConfig(**sizes | options)
    return MoELayer(config, rngs=nnx.Rngs(0))


run = nnx.jit(lambda moe, x, **options: moe(x, **options))


def silu(x):
    return x / (1 + np.exp(-x))


def test_equals_its_formula():
    moe, x = layer(shared_hidden=5), np.asarray(X)
    out, report = run(moe, X)

    @jax.jit
    def routed(logits):
        found = ops.route(logits, slots=2)
        loss = 0.01 * ops.load_balancing_loss(found) + 0.001 * ops.router_z_loss(logits)
        return found.expert_ids, found.gates, loss

    ids, gates, loss = map(np.asarray, routed(x @ np.asarray(moe.router.kernel[...])))
    experts, wanted = moe.experts, np.zeros((30, 8))
    assert experts.w_gate is not None
    w_gate, w_up, w_down = (
        np.asarray(w[...]) for w in (experts.w_gate, experts.w_up, experts.w_down)
    )
    for token in range(30):
        for expert, weight in zip(ids[token], gates[token], strict=True):
            hidden = silu(x[token] @ w_gate[expert]) * (x[token] @ w_up[expert])
            wanted[token] += weight * (hidden @ w_down[expert])
    assert moe.shared_up is not None
    assert moe.shared_down is not None
    gate, up = np.split(x @ np.asarray(moe.shared_up.kernel[...]), 2, axis=1)
    wanted += (silu(gate) * up) @ np.asarray(moe.shared_down.kernel[...])
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "silu"])
def test_every_parameter_learns(activation):
    moe = layer(
        activation=activation, bias=True, shared_hidden=5, noise=True, cv_weight=0.1,
        sequence_weight=0.1,
    )  # fmt: skip
    rebuild, params = split_params(moe)

    def loss(params):
        out, report = rebuild(params)(
            X, segment_ids=jnp.arange(30) // 10, num_sequences=3, key=jax.random.key(1)
        )
        return (out**2).sum() + report.loss

    for path, grad in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert float(jnp.abs(grad).max()) > 0, path


def test_directional_finite_differences():
    """Router, gates, experts and losses at once, where no token changes its experts."""
    moe = layer(bias=True, shared_hidden=5)
    rebuild, params = split_params(moe)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(X.shape), jnp.float32)

    @jax.jit
    def loss(params, x):
        out, report = rebuild(params)(x)
        return jnp.vdot(out, weights) + report.loss

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, X)
    leaves, tree = jax.tree.flatten((params, X))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        steps = [rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]

        def moved(by, steps=steps):
            at = [leaf + by * step for leaf, step in zip(leaves, steps, strict=True)]
            return float(loss(*jax.tree.unflatten(tree, at)))

        slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
        grads = jax.tree.leaves(gradient)
        mine = sum(float(np.vdot(g, step)) for g, step in zip(grads, steps, strict=True))
        assert abs(slope) > 1
        assert mine == pytest.approx(slope, rel=1e-2)


def test_padding_gives_zeros_and_no_gradient():
    moe = layer(shared_hidden=5)
    valid = jnp.arange(30) < 20
    out, report = run(moe, X, valid=valid)
    alone, alone_report = run(moe, X[:20])
    np.testing.assert_allclose(out[:20], alone, atol=1e-6)
    assert not np.asarray(out[20:]).any()
    assert float(report.loss) == pytest.approx(float(alone_report.loss), rel=1e-5)
    assert int(report.stats.load.sum()) == 40


def test_bias_balances_without_a_loss():
    moe = layer(balance_weight=0.0, z_weight=0.0, bias_rate=0.01, scoring="sigmoid")
    x = X.at[:, 0].set(1)
    moe.router.kernel[...] = moe.router.kernel[...].at[0, 0].add(2)
    report = nnx.jit(lambda moe: moe(x)[1])
    first = report(moe)
    for _ in range(60):
        moe.update_bias(report(moe).stats.load)
    last = report(moe)
    assert float(last.stats.max_over_mean) < 0.8 * float(first.stats.max_over_mean)
    assert float(last.loss) == 0
    assert "expert_bias" not in str(jax.tree.structure(split_params(moe)[1]))


def test_capacity_drops_and_says_so():
    free, bound = layer(), layer(capacity_factor=0.5)
    assert int(run(free, X)[1].stats.dropped) == 0
    out, report = run(bound, X)
    assert int(report.stats.dropped) >= 60 - 4 * round(0.5 * 30 * 2 / 4)
    assert np.isfinite(out).all()


def test_a_broken_router_is_named():
    moe, valid = layer(), jnp.arange(30) < 20
    fine = jax.jit(lambda x: moe(x, valid=valid)[1])
    # NaN in padding is no mistake; in tokens it is.
    check_routers({"first": fine(X), "second": fine(X.at[25].set(jnp.nan))})
    broken = fine(X.at[3, 0].set(jnp.inf).at[4].set(jnp.nan))
    assert int(broken.stats.nonfinite) == 2
    with pytest.raises(
        FloatingPointError, match=r"blocks.1.moe: .* not finite for 2 of its tokens"
    ):
        check_routers({"blocks.0.moe": fine(X), "blocks.1.moe": broken})


def test_no_tokens():
    moe = layer(shared_hidden=5, cv_weight=0.1)
    out, report = run(moe, X[:0])
    assert out.shape == (0, 8)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(report))


def test_noise_only_with_a_key():
    moe = layer(noise=True)
    np.testing.assert_array_equal(run(moe, X)[0], run(moe, X)[0])
    one, other = (run(moe, X, key=jax.random.key(i))[0] for i in range(2))
    assert not np.array_equal(one, other)


def test_computes_in_the_dtype_of_its_input():
    out, report = run(layer(shared_hidden=5), X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert report.loss.dtype == jnp.float32


def test_learns_a_function_of_regions():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((256, 8)), jnp.float32)
    wanted = jnp.where(x[:, :1] > 0, x @ rng.standard_normal((8, 8)), -x)
    rebuild, params = split_params(layer(hidden=16))
    optimizer = optax.adam(1e-2)

    def loss(params):
        out, report = rebuild(params)(x)
        return ((out - wanted) ** 2).mean() + report.loss

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(150):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 5}, "slots is 5; expected 1 to 4"),
        ({"hidden": 0}, "MoEConfig.hidden is 0"),
        ({"activation": "relu"}, "MoEConfig.activation is 'relu'"),
        ({"save": "none"}, "MoEConfig.save is 'none'"),
        ({"z_weight": -1.0}, "MoEConfig.z_weight is -1.0"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
    ],
)
def test_configurations_that_cannot_be(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_missing_segments_are_asked_for():
    with pytest.raises(ValueError, match="pass segment_ids"):
        layer(sequence_weight=0.1)(X)
