"""One training step: loss, gradients, update, guard, averaging; jitted, with donated state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Float, Int

from jaxrec.ops.jagged import JaggedBatch
from jaxrec.ops.losses import (
    full_softmax_loss,
    gbce_loss,
    sampled_softmax_loss,
)
from jaxrec.typing import PADDING_ID, PyTree


class TrainState(NamedTuple):
    """All that a bit-exact resume needs besides the data iterator.

    Attributes:
      step: updates done; i32 scalar.
      params: f32 master weights (an `nnx.State` of `nnx.Param`).
      opt_state: the optimizer's state.
      ema_params: exponential moving average of params, or None.
      key: key data from which each step folds its own.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    ema_params: PyTree | None
    key: jax.Array

    @property
    def eval_params(self) -> PyTree:
        """The averaged weights where there are any, else the weights."""
        return self.params if self.ema_params is None else self.ema_params


class StepMetrics(NamedTuple):
    """Device scalars of one step.

    `nonfinite` is the number (in `jax.tree.leaves` order) of the first parameter whose gradient
    is not finite, -1 if all are; such a step leaves weights and optimizer as they were.
    """

    loss: jax.Array
    grad_norm: jax.Array
    num_tokens: jax.Array
    num_targets: jax.Array
    learning_rate: jax.Array
    nonfinite: jax.Array


type TrainStep = Callable[[TrainState, JaggedBatch], tuple[TrainState, StepMetrics]]


@dataclass(frozen=True)
class LossConfig:
    """Which loss, and its negatives.

    Attributes:
      name: "full" softmax, "sampled" softmax or "gbce".
      num_negatives: items drawn (uniformly, shared by the batch unless `per_target`).
      per_target: draws negatives for every target on its own.
      temperature: scores are divided by it.
      calibration: gBCE's t.
    """

    name: Literal["full", "sampled", "gbce"] = "full"
    num_negatives: int = 256
    per_target: bool = False
    temperature: float = 1.0
    calibration: float = 0.75


def target_loss(
    config: LossConfig,
    hidden: Float[jax.Array, "M D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "M"],
    key: jax.Array,
) -> Float[jax.Array, ""]:
    """The configured loss, its negatives drawn from `key`."""
    hidden = hidden / config.temperature
    if config.name == "full":
        return full_softmax_loss(hidden, table, target_ids)
    shape = (config.num_negatives,)
    if config.per_target:
        shape = (target_ids.shape[0], *shape)
    negatives = jax.random.randint(key, shape, 1, table.shape[0], jnp.int32)
    if config.name == "sampled":
        return sampled_softmax_loss(hidden, table, target_ids, negatives)
    return gbce_loss(hidden, table, target_ids, negatives, calibration=config.calibration)


def init_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float | None = None,
) -> TrainState:
    """The state before the first step; weights are copied, so the model stays usable."""
    params = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=None if ema_decay is None else jax.tree.map(jnp.copy, params),
        key=jax.random.key_data(jax.random.key(seed, impl="rbg")),
    )


def make_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    loss: LossConfig,
    schedule: optax.Schedule,
    ema_decay: float | None = None,
) -> TrainStep:
    """Builds the jitted step of `model` (anything with `encode` and `item_embeddings`)."""
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def batch_loss(params: PyTree, batch: JaggedBatch, key: jax.Array) -> jax.Array:
        module: Any = nnx.merge(graphdef, params, rest)
        dropout_key, negatives_key = jax.random.split(key)
        hidden = module.encode(batch, key=dropout_key)[batch.target_positions]
        table = module.item_embeddings().astype(hidden.dtype)
        return target_loss(loss, hidden, table, batch.target_ids, negatives_key)

    def step(state: TrainState, batch: JaggedBatch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="rbg"), state.step)
        value, grads = jax.value_and_grad(batch_loss)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        nonfinite = first_nonfinite(grads, value)
        new = TrainState(
            state.step, params, opt_state, _average(state, params, ema_decay), state.key
        )
        new = jax.tree.map(lambda a, b: jnp.where(nonfinite < 0, a, b), new, state)
        metrics = StepMetrics(
            loss=value,
            grad_norm=optax.global_norm(grads),
            num_tokens=batch.seq_offsets[-1],
            num_targets=(batch.target_ids != PADDING_ID).sum(),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            nonfinite=nonfinite,
        )
        return new._replace(step=state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def _average(state: TrainState, params: PyTree, decay: float | None) -> PyTree | None:
    if decay is None:
        return None
    # An average that starts from the first weights would carry them for 1 / (1 - decay) steps.
    warm = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(lambda e, p: warm * e + (1 - warm) * p, state.ema_params, params)


def first_nonfinite(grads: PyTree, loss: jax.Array) -> Int[jax.Array, ""]:
    """Number of the first leaf that is not all finite; 0 if only the loss is not; else -1."""
    bad = jnp.stack([~jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)])
    first = jnp.where(bad.any() | ~jnp.isfinite(loss), jnp.argmax(bad), -1)
    return first.astype(jnp.int32)


def parameter_names(params: PyTree) -> list[str]:
    """Dotted name of every leaf, in the order that `StepMetrics.nonfinite` counts."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return [
        ".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path).removesuffix(".value")
        for path, _ in paths
    ]
