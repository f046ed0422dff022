"""One training step: loss, gradients, update, guard, averaging; jitted, with donated state."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Int

from jaxrec.data import UniformSampler
from jaxrec.functional import copy_params, leaf_names, split_params
from jaxrec.nn import ExpertBias, MoEReport, overarch_of, update_expert_bias
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.train.objective import LossConfig, Sampler, batch_loss, draw_negatives
from jaxrec.train.row_wise import Part, RowWise, select_rows, store_rows
from jaxrec.typing import PADDING_ID, PyTree


class TrainState(NamedTuple):
    """All that a bit-exact resume needs besides the data iterator.

    Attributes:
      step: updates done; i32 scalar.
      params: f32 master weights (an `nnx.State` of `nnx.Param`); see below.
      opt_state: the optimizer's state.
      ema_params: exponential moving average of params, or None.
      key: key data from which each step folds its own.

    Where routers are balanced by a bias, `params` holds it as well (`ExpertBias`): every step moves
    it by their load; the optimizer does not see it, and `ema_params` has it as it is.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    ema_params: PyTree
    key: jax.Array

    @property
    def eval_params(self) -> PyTree:
        """The averaged weights where there are any, else the weights."""
        return self.params if self.ema_params is None else self.ema_params


class StepMetrics(NamedTuple):
    """Device scalars of one step.

    `nonfinite` is the number (in `jax.tree.leaves` order) of the first parameter whose gradient
    or new value is not finite, or the number of parameters if only the loss is not; -1 if all is
    well. Any other step leaves weights, their average and the optimizer as they were. `num_pairs`
    are pairs of tokens of which one attends to the other or to itself, f32. `routers` is the report
    of each layer of experts; their losses are part of `loss`.
    """

    loss: jax.Array
    grad_norm: jax.Array
    num_tokens: jax.Array
    num_targets: jax.Array
    num_pairs: jax.Array
    learning_rate: jax.Array
    nonfinite: jax.Array
    routers: tuple[MoEReport, ...] = ()


type Optimizer = optax.GradientTransformation | RowWise
type TrainStep = Callable[[TrainState, JaggedBatch], tuple[TrainState, StepMetrics]]


@dataclass(frozen=True)
class CompiledStep:
    """The step of `make_step`: one jitted call, compiled once for each shape of batches.

    Attributes:
      jitted: of (state, batch, samplers).
      samplers: of the loss's negatives, and of the over-arch's; on the device.
    """

    jitted: Any
    samplers: tuple[Sampler, Sampler]

    def __call__(self, state: TrainState, batch: JaggedBatch) -> tuple[TrainState, StepMetrics]:
        """Runs the step."""
        return self.jitted(state, batch, self.samplers)

    def lower(self, state: Any, batch: Any) -> jax.stages.Lowered:
        """The step for a state and a batch of these shapes, ready to be compiled and looked at."""
        return self.jitted.lower(state, batch, self.samplers)

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far."""
        return self.jitted._cache_size()


def init_state(
    model: nnx.Module,
    optimizer: Optimizer,
    *,
    seed: int,
    ema_decay: float | None = None,
) -> TrainState:
    """The state before the first step; weights are copied, so the model stays usable."""
    _check_decay(ema_decay)
    weights = copy_params(model)
    params = _with_bias(weights, jax.tree.map(jnp.copy, nnx.state(model, ExpertBias)))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(weights),
        ema_params=None if ema_decay is None else jax.tree.map(jnp.copy, params),
        key=jax.random.key_data(jax.random.key(seed, impl="rbg")),
    )


def make_step(
    model: Any,
    optimizer: Optimizer,
    *,
    loss: LossConfig,
    schedule: optax.Schedule,
    ema_decay: float | None = None,
    sampler: Sampler | None = None,
    overarch_sampler: Sampler | None = None,
) -> CompiledStep:
    """Builds the jitted step of `model` (anything with `encode` and `item_embeddings`).

    A model with `encode_with_reports` and `moe_layers` is trained with its routers' losses, and
    their bias is moved.

    The state is donated: use the returned one. `ema_decay` must be that of `init_state`.
    `sampler` draws the negatives, `overarch_sampler` the over-arch's; None draws uniformly.

    With a `RowWise` optimizer nothing in the step is as large as the item table: the rows that a
    batch and its negatives name are read, trained, and written back in place.

    Raises:
      ValueError: the model has an over-arch and the loss is not told how to train it, or the
        other way about; item rows alone with the full softmax or with averaged weights.
    """
    _check_decay(ema_decay)
    if (overarch_of(model) is None) != (loss.overarch is None):
        raise ValueError(
            "a model with an over-arch is trained with LossConfig(overarch=OverArchLoss(...)), "
            "one without it with overarch=None"
        )
    if isinstance(optimizer, RowWise):
        _check_row_wise(loss, ema_decay)
    rebuild, own_params = split_params(model)
    table = jax.eval_shape(lambda params: rebuild(params).item_embeddings(), own_params)
    num_items = table.shape[0] - 1
    uniform = UniformSampler.create(num_items)
    samplers = jax.device_put((sampler or uniform, overarch_sampler or uniform))

    def moved_bias(weights: PyTree, bias: PyTree, reports: tuple[MoEReport, ...]) -> PyTree:
        if not jax.tree.leaves(bias):
            return bias
        own = jax.tree.map(lambda leaf: leaf, bias)  # the module writes into what it is given
        module = rebuild(_with_bias(weights, own))
        update_expert_bias(module, reports)
        return nnx.state(module, ExpertBias)

    def step(
        state: TrainState, batch: JaggedBatch, samplers: tuple[Sampler, Sampler]
    ) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="rbg"), state.step)
        dropout_key, negatives_key = jax.random.split(key)
        weights, bias = _split_bias(state.params)
        with jax.named_scope("draw"):
            negatives = draw_negatives(loss, negatives_key, samplers, batch.target_ids.shape[0])
            part = Part(batch, negatives, weights, state.opt_state)
            if isinstance(optimizer, RowWise):
                part = select_rows(weights, state.opt_state, batch, negatives)

        def value_of(own: PyTree) -> tuple[jax.Array, tuple[MoEReport, ...]]:
            module = rebuild(nnx.merge_state(_with_bias(own, bias), part.attributes(model)))
            return batch_loss(
                module, loss, part.batch, part.negatives,
                num_items=num_items, dropout_key=dropout_key,
            )  # fmt: skip

        (value, reports), grads = jax.value_and_grad(value_of, has_aux=True)(part.weights)
        with jax.named_scope("update"):
            updated, opt_state = _update(optimizer, grads, part, state.step)
            nonfinite = first_nonfinite(value, grads, updated)
            guard = partial(jax.tree.map, lambda new, old: jnp.where(nonfinite < 0, new, old))
            bias = guard(moved_bias(part.weights, bias, reports), bias)
            updated, opt_state = guard((updated, opt_state), (part.weights, part.opt_state))
            if part.rows is not None:
                new = updated, opt_state
                updated, opt_state = store_rows(weights, state.opt_state, part.rows, new)
            params = _with_bias(updated, bias)
            average = guard(_average(state, params, ema_decay), state.ema_params)
        metrics = StepMetrics(
            loss=value,
            grad_norm=optax.tree.norm(grads),
            num_tokens=batch.seq_offsets[-1],
            num_targets=(batch.target_ids != PADDING_ID).sum(),
            num_pairs=num_pairs(jnp.asarray(batch.seq_offsets)),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            nonfinite=nonfinite,
            routers=reports,
        )
        return TrainState(state.step + 1, params, opt_state, average, state.key), metrics

    return CompiledStep(jax.jit(step, donate_argnums=0), samplers)


def num_pairs(seq_offsets: jax.Array) -> jax.Array:
    """Pairs of tokens of which one attends to the other or to itself; f32."""
    lengths = jnp.diff(seq_offsets).astype(jnp.float32)
    return (lengths * (lengths + 1) / 2).sum()


def _update(optimizer: Optimizer, grads: PyTree, part: Part, step: jax.Array) -> tuple[Any, Any]:
    """Next weights and optimizer state of a step's part."""
    if isinstance(optimizer, RowWise):
        return optimizer.update(grads, part.opt_state, part.weights, step)
    updates, opt_state = optimizer.update(grads, part.opt_state, part.weights)
    return optax.apply_updates(part.weights, updates), opt_state


def _check_row_wise(loss: LossConfig, ema_decay: float | None) -> None:
    if loss.name == "full":
        raise ValueError(
            "the full softmax has a gradient for every item, so that no step names few rows; "
            "update rows alone with the sampled loss or gbce, or all of them with rows=None"
        )
    if ema_decay is not None:
        raise ValueError(
            f"ema_decay={ema_decay} averages every row in every step, which updating few rows "
            "avoids; train with ema_decay=None, or all rows with rows=None"
        )


def _split_bias(params: PyTree) -> tuple[PyTree, PyTree]:
    """(weights, bias of the routers): the latter without leaves for a model that has none."""
    weights, bias = nnx.split_state(params, nnx.Param, ExpertBias)
    return weights, bias


def _with_bias(weights: PyTree, bias: PyTree) -> PyTree:
    return nnx.merge_state(weights, bias) if jax.tree.leaves(bias) else weights


def _check_decay(decay: float | None) -> None:
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"ema_decay is {decay}; expected None or a number from 0, below 1")


def _average(state: TrainState, params: PyTree, decay: float | None) -> PyTree:
    if (decay is None) != (state.ema_params is None):
        raise ValueError("init_state and make_step were given different ema_decay; both need one")
    if decay is None:
        return None
    # An average that starts from the first weights would carry them for 1 / (1 - decay) steps.
    warm = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    weights, bias = _split_bias(params)
    averaged, _ = _split_bias(state.ema_params)
    averaged = jax.tree.map(lambda e, p: warm * e + (1 - warm) * p, averaged, weights)
    return _with_bias(averaged, bias)


def first_nonfinite(loss: jax.Array, grads: PyTree, params: PyTree) -> Int[jax.Array, ""]:
    """Number of the first parameter that is not all finite; see `StepMetrics`."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)
    bad = [~(jnp.isfinite(grad) & jnp.isfinite(param)).all() for grad, param in pairs]
    bad = jnp.stack([*bad, ~jnp.isfinite(loss)])
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def parameter_names(params: PyTree) -> list[str]:
    """Dotted name of every weight, in the order that `StepMetrics.nonfinite` counts."""
    return leaf_names(_split_bias(params)[0])
