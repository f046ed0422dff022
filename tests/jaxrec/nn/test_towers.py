import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.nn import (
    MLPOverArch,
    MLPOverArchConfig,
    SASRec,
    SASRecConfig,
    TaskHeads,
    TaskHeadsConfig,
    TwoStage,
)

TASKS = TaskHeadsConfig(4, ("click", "like", "share"), hidden=5)


def test_every_task_begins_with_the_encoders_state():
    state = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    queries = TaskHeads(TASKS, rngs=nnx.Rngs(0))(state)
    assert queries.shape == (2, 3, 4)
    np.testing.assert_array_equal(queries, np.broadcast_to(state[:, None], queries.shape))


def test_a_head_is_a_network_of_its_own():
    rng = np.random.default_rng(0)
    heads = TaskHeads(TASKS, rngs=nnx.Rngs(0))
    heads.down[...] = jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)
    heads.bias[...] = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    state = rng.normal(size=(2, 4)).astype(np.float32)
    queries = heads(jnp.asarray(state))
    for task in range(3):
        x = state @ np.asarray(heads.up[task]) + np.asarray(heads.bias[task])
        expected = state + (x / (1 + np.exp(-x))) @ np.asarray(heads.down[task])
        np.testing.assert_allclose(queries[:, task], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(heads(jnp.asarray(state[0])), queries[0], rtol=1e-5, atol=1e-6)


def test_tasks_are_known_by_name():
    heads = TaskHeads(TASKS, rngs=nnx.Rngs(0))
    assert heads.index("like") == 1
    with pytest.raises(ValueError, match="unknown task 'buy'; known are click, like, share"):
        heads.index("buy")
    with pytest.raises(ValueError, match="all different"):
        TaskHeadsConfig(4, ("click", "click"))


def test_two_stages_need_one_width():
    towers = SASRec(SASRecConfig(5, width=8), rngs=nnx.Rngs(0))
    overarch = MLPOverArch(MLPOverArchConfig(4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="width is 8, the over-arch's 4"):
        TwoStage(towers, overarch)
