"""The block with every saving policy beside its automatic gradient, and what each one keeps."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.nn import HSTUConfig
from jaxrec.ops.hstu_block import (
    SAVES,
    HSTUShape,
    HSTUWeights,
    hstu_block,
    hstu_block_saved_bytes,
)

WIDTH, BUCKETS = 8, 5
SHAPE = HSTUShape(heads=2, qk_width=3, v_width=5, max_len=9, dropout=0.3)


def weights_of(shape, width=WIDTH, *, time=True):
    gates = shape.gate_columns
    columns = 2 * gates + 2 * shape.heads * shape.qk_width
    sizes = [
        (width,), (width,), (width, columns), (columns,), (gates, width), (width,),
        (shape.heads, shape.max_len), (shape.heads, BUCKETS),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=size) * 0.5, jnp.float32) for size in sizes]
    return HSTUWeights(*(arrays if time else arrays[:-1]))


def inputs(dtype=jnp.float32, num_tokens=21):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(num_tokens, WIDTH)), dtype)
    offsets = jnp.asarray([0, 9, 9, 10, 17], jnp.int32)
    timestamps = jnp.asarray(np.sort(rng.integers(0, 99, num_tokens)), jnp.int32)
    return x, offsets, timestamps


@pytest.mark.parametrize(
    ("dtype", "policies"), [(jnp.float32, SAVES), (jnp.bfloat16, ("attended",))]
)
def test_every_policy_has_the_automatic_gradient(dtype, policies):
    x, offsets, timestamps = inputs(dtype)
    key, weights = jax.random.key(2), weights_of(SHAPE)

    def run(save, x, weights):
        def block(x, weights):
            return hstu_block(
                x, weights, offsets, shape=SHAPE, timestamps=timestamps, key=key, save=save
            )

        y, pull = jax.vjp(block, x, weights)
        return y, pull(jnp.cos(y))

    run = jax.jit(run, static_argnums=0)
    expected = run(None, x, weights)
    assert expected[0].dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 4e-2
    for save in policies:
        for a, b in zip(*map(jax.tree.leaves, (run(save, x, weights), expected)), strict=True):
            assert a.dtype == b.dtype
            a, b = (np.asarray(value).astype(np.float64) for value in (a, b))
            np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("save", SAVES)
def test_saved_bytes_are_those_that_vjp_keeps(save):
    for dtype in (jnp.float32, jnp.bfloat16):
        x, offsets, timestamps = inputs(dtype)
        weights = weights_of(SHAPE)
        block = partial(
            hstu_block, seq_offsets=offsets, shape=SHAPE, timestamps=timestamps, save=save
        )
        kept = jax.tree.leaves(jax.vjp(block, x, weights)[1])
        given = [*weights, offsets, timestamps]
        own = [a for a in kept if not any(a is b or a.shape == b.shape for b in given)]
        assert len(kept) - len(own) == len(given)
        wanted = hstu_block_saved_bytes(
            21, WIDTH, SHAPE, save=save, itemsize=jnp.dtype(dtype).itemsize
        )
        assert sum(a.nbytes for a in own) == wanted


def test_formula():
    shape = HSTUShape(heads=8, qk_width=64, v_width=128, max_len=1)
    policies: list[tuple[Any, int]] = [("x", 1), ("attended", 2), ("projections", 2 + 3)]
    for save, elements in policies:
        assert hstu_block_saved_bytes(10, 1024, shape, save=save, itemsize=2) == (
            10 * 2 * 1024 * elements
        )


@pytest.mark.slow
@pytest.mark.parametrize("save", ["x", "projections", None])
def test_a_layer_more_costs_what_it_saves(save):
    """In the compiled program: what is to be repeated is not kept behind the policy's back."""
    tokens, width, shape = 2048, 64, HSTUShape(2, 16, 32, 32, dropout=0.2)
    weights = weights_of(shape, width, time=False)

    def temporary(layers):
        def loss(x, weights, offsets, key):
            for number in range(layers):
                own = jax.random.fold_in(key, number)
                x = hstu_block(x, weights, offsets, shape=shape, key=own, save=save)
            return x.sum()

        arguments = [jax.ShapeDtypeStruct((tokens, width), jnp.float32), weights]
        arguments += [jax.ShapeDtypeStruct((65,), jnp.int32), jax.random.key(0)]
        compiled: Any = jax.jit(jax.grad(loss, argnums=1)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    grown = (temporary(5) - temporary(3)) / 2
    if save is None:
        saved = hstu_block_saved_bytes(tokens, width, shape, save="projections", itemsize=4)
        assert grown > 1.5 * saved
    else:
        saved = hstu_block_saved_bytes(tokens, width, shape, save=save, itemsize=4)
        assert saved <= grown < 1.02 * saved + 65_536


def test_unknown_policies_are_refused(monkeypatch):
    # Outside of tests nothing checks the annotations: the message must.
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"HSTUConfig\.save is 'z'"):
        HSTUConfig(5, save="z")  # pyright: ignore
