"""One training step: loss, gradients, update, guard, averaging; jitted, with donated state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Float, Int

from jaxrec.data import PopularitySampler, UniformSampler
from jaxrec.functional import copy_params, leaf_names, split_params
from jaxrec.nn import (
    ExpertBias,
    MoEReport,
    encode_with_reports,
    overarch_of,
    update_expert_bias,
)
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.ops.losses import (
    full_softmax_loss,
    gbce_loss,
    sampled_softmax_loss,
    scored_softmax_loss,
    usable_negatives,
)
from jaxrec.typing import PADDING_ID, PyTree

type Sampler = UniformSampler | PopularitySampler


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
    well. Any other step leaves weights, their average and the optimizer as they were. `routers` is
    the report of each layer of experts; their losses are part of `loss`.
    """

    loss: jax.Array
    grad_norm: jax.Array
    num_tokens: jax.Array
    num_targets: jax.Array
    learning_rate: jax.Array
    nonfinite: jax.Array
    routers: tuple[MoEReport, ...] = ()


type TrainStep = Callable[[TrainState, JaggedBatch], tuple[TrainState, StepMetrics]]


@dataclass(frozen=True)
class OverArchLoss:
    """How an over-arch is trained beside its towers: a sampled softmax over its own scores.

    Attributes:
      weight: of this loss; the towers' has 1.
      num_negatives: items drawn, shared by the batch.
      negatives: "uniform", or "popularity" (count + 1) ** 0.75; the loss corrects for either.
      train_towers: whether its gradient reaches the towers; False trains the over-arch alone.
    """

    weight: float = 1.0
    num_negatives: int = 256
    negatives: Literal["uniform", "popularity"] = "uniform"
    train_towers: bool = True

    def __post_init__(self):
        if self.negatives not in ("uniform", "popularity"):
            raise ValueError(
                f"unknown negatives {self.negatives!r}; expected uniform or popularity"
            )
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives is {self.num_negatives}; expected at least 1")
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}; expected a number above 0")


@dataclass(frozen=True)
class LossConfig:
    """Which loss, and its negatives.

    Attributes:
      name: "full" softmax, "sampled" softmax or "gbce".
      num_negatives: items drawn, shared by the batch unless `per_target`.
      negatives: "uniform", or "popularity" (count + 1) ** 0.75; the sampled softmax corrects for
        either.
      per_target: draws negatives for every target on its own.
      temperature: scores are divided by it.
      calibration: gBCE's t.
      overarch: loss of the model's over-arch, added to this; None for a model without one.
    """

    name: Literal["full", "sampled", "gbce"] = "full"
    num_negatives: int = 256
    negatives: Literal["uniform", "popularity"] = "uniform"
    per_target: bool = False
    temperature: float = 1.0
    calibration: float = 0.75
    overarch: OverArchLoss | None = None

    def __post_init__(self):
        if self.name not in ("full", "sampled", "gbce"):
            raise ValueError(f"unknown loss {self.name!r}; expected full, sampled or gbce")
        if self.negatives not in ("uniform", "popularity"):
            raise ValueError(
                f"unknown negatives {self.negatives!r}; expected uniform or popularity"
            )
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives is {self.num_negatives}; expected at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; expected a number above 0")
        if not 0 <= self.calibration <= 1:
            raise ValueError(f"calibration is {self.calibration}; expected 0 to 1")


def target_loss(
    config: LossConfig,
    hidden: Float[jax.Array, "M D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "M"],
    key: jax.Array,
    sampler: Sampler,
) -> Float[jax.Array, ""]:
    """The configured loss, its negatives drawn by `sampler`."""
    hidden = hidden / config.temperature
    if config.name == "full":
        return full_softmax_loss(hidden, table, target_ids)
    shape = (config.num_negatives,)
    if config.per_target:
        shape = (target_ids.shape[0], *shape)
    negatives = sampler.draw(key, shape)
    if config.name == "sampled":
        log_q = jnp.asarray(sampler.log_q)
        return sampled_softmax_loss(hidden, table, target_ids, negatives, log_q=log_q)
    return gbce_loss(hidden, table, target_ids, negatives, calibration=config.calibration)


def overarch_loss(
    config: OverArchLoss,
    overarch: Any,
    hidden: Float[jax.Array, "M D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "M"],
    key: jax.Array,
    sampler: Sampler,
) -> Float[jax.Array, ""]:
    """Sampled softmax with the over-arch as the similarity.

    Pointwise over-archs score the shared negatives once for all; a listwise one scores each
    target together with the negatives, first in a list whose order it does not see.
    """
    if not config.train_towers:
        hidden, table = jax.lax.stop_gradient((hidden, table))
    negatives = sampler.draw(key, (config.num_negatives,))
    usable = usable_negatives(target_ids, negatives)
    components = overarch.item_components(table)
    target = jax.tree.map(lambda column: column[target_ids][:, None], components)
    shared = jax.tree.map(lambda column: column[negatives][None], components)
    present = jnp.ones((*target_ids.shape, 1), bool)
    if overarch.listwise:
        beside = jax.tree.map(
            lambda s, t: jnp.broadcast_to(s, (*t.shape[:1], *s.shape[1:])), shared, target
        )
        listed = jax.tree.map(lambda t, s: jnp.concatenate([t, s], axis=1), target, beside)
        scores = overarch(hidden, listed, jnp.concatenate([present, usable], axis=1))
        target_scores, negative_scores = scores[:, 0], scores[:, 1:]
    else:
        target_scores = overarch(hidden, target, present)[:, 0]
        negative_scores = overarch(hidden, shared, usable)
    log_q = jnp.asarray(sampler.log_q)
    loss = scored_softmax_loss(target_scores, negative_scores, target_ids, negatives, log_q=log_q)
    return config.weight * loss


def init_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
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
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    loss: LossConfig,
    schedule: optax.Schedule,
    ema_decay: float | None = None,
    sampler: Sampler | None = None,
    overarch_sampler: Sampler | None = None,
) -> TrainStep:
    """Builds the jitted step of `model` (anything with `encode` and `item_embeddings`).

    A model with `encode_with_reports` and `moe_layers` is trained with its routers' losses, and
    their bias is moved.

    The state is donated: use the returned one. `ema_decay` must be that of `init_state`.
    `sampler` draws the negatives, `overarch_sampler` the over-arch's; None draws uniformly.

    Raises:
      ValueError: the model has an over-arch and the loss is not told how to train it, or the
        other way about.
    """
    _check_decay(ema_decay)
    if (overarch_of(model) is None) != (loss.overarch is None):
        raise ValueError(
            "a model with an over-arch is trained with LossConfig(overarch=OverArchLoss(...)), "
            "one without it with overarch=None"
        )
    num_items = jax.eval_shape(model.item_embeddings).shape[0] - 1  # pyright: ignore
    drawn = UniformSampler.create(num_items) if sampler is None else sampler
    drawn_for_overarch = (
        UniformSampler.create(num_items) if overarch_sampler is None else overarch_sampler
    )
    rebuild, _ = split_params(model)

    def batch_loss(
        weights: PyTree, bias: PyTree, batch: JaggedBatch, key: jax.Array
    ) -> tuple[jax.Array, tuple[MoEReport, ...]]:
        module: Any = rebuild(_with_bias(weights, bias))
        dropout_key, negatives_key = jax.random.split(key)
        hidden, reports = encode_with_reports(module, batch, key=dropout_key)
        hidden = hidden[batch.target_positions]
        table = module.item_embeddings().astype(hidden.dtype)
        target_ids = jnp.asarray(batch.target_ids)
        value = target_loss(loss, hidden, table, target_ids, negatives_key, drawn)
        value = sum((report.loss for report in reports), value)
        if loss.overarch is None:
            return value, reports
        key = jax.random.fold_in(negatives_key, 1)
        value += overarch_loss(
            loss.overarch, module.overarch, hidden, table, target_ids, key, drawn_for_overarch
        )
        return value, reports

    def moved_bias(weights: PyTree, bias: PyTree, reports: tuple[MoEReport, ...]) -> PyTree:
        if not jax.tree.leaves(bias):
            return bias
        own = jax.tree.map(lambda leaf: leaf, bias)  # the module writes into what it is given
        module = rebuild(_with_bias(weights, own))
        update_expert_bias(module, reports)
        return nnx.state(module, ExpertBias)

    def step(state: TrainState, batch: JaggedBatch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="rbg"), state.step)
        weights, bias = _split_bias(state.params)
        gradient = jax.value_and_grad(batch_loss, has_aux=True)
        (value, reports), grads = gradient(weights, bias, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, weights)
        updated = optax.apply_updates(weights, updates)
        nonfinite = first_nonfinite(value, grads, updated)
        params = _with_bias(updated, moved_bias(weights, bias, reports))
        new = TrainState(
            state.step, params, opt_state, _average(state, params, ema_decay), state.key
        )
        new = jax.tree.map(lambda a, b: jnp.where(nonfinite < 0, a, b), new, state)
        metrics = StepMetrics(
            loss=value,
            grad_norm=optax.tree.norm(grads),
            num_tokens=batch.seq_offsets[-1],
            num_targets=(batch.target_ids != PADDING_ID).sum(),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            nonfinite=nonfinite,
            routers=reports,
        )
        return new._replace(step=state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


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
    bad = [~(jnp.isfinite(grad).all() & jnp.isfinite(param).all()) for grad, param in pairs]
    bad = jnp.stack([*bad, ~jnp.isfinite(loss)])
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def parameter_names(params: PyTree) -> list[str]:
    """Dotted name of every weight, in the order that `StepMetrics.nonfinite` counts."""
    return leaf_names(_split_bias(params)[0])
