import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.functional import (
    copy_params,
    init_apply,
    leaf_names,
    split_params,
    with_params,
)


class Scale(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.gain = nnx.Param(jax.random.normal(rngs.params(), (3,)))
        self.offset = nnx.Variable(jnp.arange(3.0))

    def __call__(self, x):
        return x * self.gain[...] + self.offset[...]

    def twice(self, x, *, plus):
        return self(self(x)) + plus


def test_rebuilt_module_computes_with_the_given_params():
    model = Scale(rngs=nnx.Rngs(0))
    rebuild, params = split_params(model)
    doubled = jax.tree.map(lambda p: 2 * p, params)
    expected = 2 * model.gain[...] + model.offset[...]
    np.testing.assert_array_equal(rebuild(doubled)(jnp.ones(3)), expected)
    grads = jax.jit(jax.grad(lambda p: rebuild(p)(jnp.full(3, 5.0)).sum()))(params)
    np.testing.assert_array_equal(jax.tree.leaves(grads)[0], [5, 5, 5])


def test_with_params_shares_nothing_with_the_model():
    model = Scale(rngs=nnx.Rngs(0))
    before = np.asarray(model.gain[...])
    other = with_params(model, jax.tree.map(lambda p: p + 1, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(other.gain[...], before + 1)
    other.gain[...] = jnp.zeros(3)
    other.offset[...] = jnp.zeros(3)
    np.testing.assert_array_equal(model.gain[...], before)
    np.testing.assert_array_equal(model.offset[...], [0, 1, 2])


def test_writing_to_a_module_leaves_the_params_it_was_given():
    model = Scale(rngs=nnx.Rngs(0))
    params = copy_params(model)
    before = np.asarray(jax.tree.leaves(params)[0])
    with_params(model, params).gain[...] = jnp.zeros(3)
    np.testing.assert_array_equal(jax.tree.leaves(params)[0], before)


def test_copied_params_survive_the_donation_of_the_model_s():
    model = Scale(rngs=nnx.Rngs(0))
    copied = copy_params(model)
    before = np.asarray(model.gain[...])
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(copied)
    np.testing.assert_array_equal(model.gain[...], before)


def test_init_and_apply_equal_the_module():
    init, apply = init_apply(lambda rngs: Scale(rngs=rngs))
    key = jax.random.key(7)
    variables = jax.jit(init)(key)
    model, x = Scale(rngs=nnx.Rngs(key)), jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(apply(variables, x), model(x), rtol=1e-6)
    twice = jax.jit(lambda v: apply(v, x, method="twice", plus=1.0))(variables)
    np.testing.assert_allclose(twice, model(model(x)) + 1, rtol=1e-6)
    assert leaf_names(variables.params) == ["gain"]
    assert leaf_names(variables.rest) == ["offset"]


def test_init_differs_by_key():
    init, _ = init_apply(lambda rngs: Scale(rngs=rngs))
    first, second = (jax.tree.leaves(init(jax.random.key(i)).params)[0] for i in range(2))
    assert not np.array_equal(first, second)


def test_leaf_names_are_dotted_paths_in_leaf_order():
    assert leaf_names({"b": [1, 2], "a": {"x": 3}}) == ["a.x", "b.0", "b.1"]
