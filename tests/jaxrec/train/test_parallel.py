"""Training over many devices is training on one with the same global batches."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from parallel_case import (
    CONFIG,
    PARALLEL,
    PLAIN,
    make_model,
    one_device_steps,
    parallel_run,
    split,
    train_steps,
)

from jaxrec.data import PopularitySampler, item_counts
from jaxrec.distributed import BalanceConfig
from jaxrec.nn import SASRec, SASRecConfig
from jaxrec.sharding import make_mesh
from jaxrec.train import (
    LossConfig,
    NonFiniteError,
    OptimizerConfig,
    ParallelConfig,
    Progress,
    TrainConfig,
    evaluate_ranking,
    make_rank_fn,
    read_log,
    train,
    with_params,
)

STEPS = 12


def assert_close(one, other, relative):
    """Alike in parts of the largest value; the padding row, which nobody reads, aside."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    num_rows = split().train.num_items + 1
    for a, b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        if b.ndim and b.shape[0] == num_rows:
            a, b = a[1:], b[1:]
        np.testing.assert_allclose(a, b, rtol=relative, atol=relative * np.abs(b).max(initial=0))


def test_balanced_and_prioritised_on_eight_devices_is_one_device():
    model = make_model()
    losses, state = train_steps(parallel_run(model), STEPS)
    wanted, whole = one_device_steps(model, STEPS)
    assert wanted[-1] < wanted[0] - 0.1
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert_close(state, whole, 1e-4)
