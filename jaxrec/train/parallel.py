"""Training over many devices: item rows split over them, samples balanced, rows fetched early."""

from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxrec.data import TrainingBatches, UniformSampler
from jaxrec.distributed import BalanceConfig, ShardedState, ShardedTables, init_sharded_state
from jaxrec.functional import leaf_names
from jaxrec.nn import overarch_of
from jaxrec.sharding import replicated
from jaxrec.train.objective import LossConfig, Sampler
from jaxrec.train.parallel_batches import GlobalBatches, ParallelBatches
from jaxrec.train.parallel_step import (
    ITEMS,
    ParallelStep,
    dense_optimizer,
    item_table,
    make_loss,
    make_prepare,
)
from jaxrec.train.row_wise import RowWise, RowWiseState, split_items, with_items
from jaxrec.train.step import TrainState
from jaxrec.typing import PyTree


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is trained over the devices of a mesh.

    The item rows and their moments are split over the devices; all other weights are on each. A
    step trains on a *global batch* of `num_sources` batches of the training configuration, shared
    by the devices, with one set of negatives for all. `OptimizerConfig.rows` is the optimizer of
    the item rows; `clip_norm` clips the gradient of the other weights, by their own norm.

    Attributes:
      num_sources: batches of a global batch. It belongs to the run, not to the machine: the same
        on every number of devices that divides it, so that a run goes on elsewhere with the same
        global batches.
      axis: of the mesh; all other axes have size 1.
      balance: how samples are exchanged so that all devices compute equally long; None leaves
        samples where they were read. `token_budget` and `max_sequences` are then room for one
        source's share; None is a quarter more tokens and twice the sequences of a batch.
      prioritized: rows that successive batches do not share travel beneath the computation; see
        `PrioritizedStep`. Results are the same.
      virtual_shards: a multiple of the number of devices; see `jaxrec.distributed.tables`.
    """

    num_sources: int
    axis: str = "data"
    balance: BalanceConfig | None = None
    prioritized: bool = False
    virtual_shards: int = 256

    def __post_init__(self):
        for name in ("num_sources", "virtual_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


class ParallelRun:
    """What the training loop needs of a run on many devices.

    Args:
      model: anything that a step with `RowWise` trains: its item rows are an `ItemEmbedding`.
      batches: of one source.
      optimizer: from `make_optimizer`, with rows of their own.
      loss: sampled or gbce, with shared negatives.
      sampler: of its negatives; None draws uniformly.
      schedule: of the learning rate.
      seed: of negatives and dropout.
      config, mesh: how and where.

    Raises:
      ValueError: the mesh lacks the axis, has another one above 1, or does not divide the sources
        or virtual shards; a model, loss or optimizer that is not trained over many devices.

    Attributes:
      state: the first; the loop's to donate.
      step: from state and batch to the next state.
      batches: for the step.
      settled: completes a state between steps.
    """

    def __init__(
        self,
        model: Any,
        batches: TrainingBatches,
        optimizer: RowWise | optax.GradientTransformation,
        *,
        loss: LossConfig,
        sampler: Sampler | None,
        schedule: optax.Schedule,
        seed: int,
        config: ParallelConfig,
        mesh: Mesh,
    ):
        check_mesh(config, mesh)
        optimizer = _checked(model, loss, optimizer)
        self._weights = nnx.state(model, nnx.Param)
        self._key = jax.random.key_data(jax.random.key(seed, impl="rbg"))
        table = item_table(model, optimizer)
        self._tables = ShardedTables(
            [table], mesh, axis=config.axis, virtual_shards=config.virtual_shards
        )
        dense = dense_optimizer(optimizer)
        self.state = self._first_state(dense)
        step = ParallelStep(
            self._tables, make_loss(model, self._tables, loss), dense,
            prioritized=config.prioritized,
        )  # fmt: skip
        self.step, self.settled = step, step.settled
        uniform = UniformSampler.create(table.num_rows - 1)
        self.batches = ParallelBatches(
            GlobalBatches(batches, config.num_sources), mesh, config.axis, config.balance,
            prepare=make_prepare(self._tables, loss, sampler or uniform, schedule, seed=seed),
            with_following=config.prioritized,
        )  # fmt: skip
        self._gather = jax.jit(self._whole, out_shardings=replicated(mesh))

    @property
    def param_names(self) -> list[str]:
        """Names of weights, in the order in which a step counts them, the item rows last."""
        others, _ = split_items(self._weights)
        return [*leaf_names(others), "item rows"]

    def gathered(self, state: ShardedState) -> TrainState:
        """The state as one device would have it, on a device of this process.

        All processes call it together.

        Cost: the item rows and their moments, on every device while it runs.
        """
        params, opt_state, step = jax.tree.map(lambda x: x.addressable_data(0), self._gather(state))
        return TrainState(step, params, opt_state, None, self._key)

    def _first_state(self, optimizer: optax.GradientTransformation) -> ShardedState:
        """The model's weights, its item rows where they are kept."""
        others, rows = split_items(self._weights)
        key = jax.random.key(0)  # drawn rows are all replaced
        state = init_sharded_state(self._tables, others, optimizer, key=key)
        return state._replace(tables=self._tables.with_rows(state.tables, {ITEMS: rows}))

    def _whole(self, state: ShardedState) -> tuple[PyTree, RowWiseState, jax.Array]:
        params = with_items(self._weights, state.params, self._tables.dense(state.tables, ITEMS))
        moments = self._tables.dense_moments(state.tables, ITEMS)
        return params, RowWiseState(state.opt_state, moments), state.step


def check_mesh(config: ParallelConfig, mesh: Mesh) -> None:
    """Whether a run fits a mesh.

    Raises:
      ValueError: it does not; the message says why.
    """
    if config.axis not in mesh.axis_names:
        known = ", ".join(mesh.axis_names)
        raise ValueError(f"the mesh has no axis {config.axis!r}; it has {known}")
    size = mesh.shape[config.axis]
    if mesh.size != size:
        raise ValueError(
            f"the mesh is {dict(mesh.shape)}; expected {config.axis!r} to be its only axis above 1"
        )
    if config.num_sources % size:
        raise ValueError(
            f"the {size} devices of axis {config.axis!r} do not divide num_sources="
            f"{config.num_sources}: each reads the same number of sources. Choose a multiple of "
            "the devices (of all numbers of devices that the run may move to)."
        )


def _checked(model: Any, loss: LossConfig, optimizer: Any) -> RowWise:
    """The optimizer, if model and loss are of those that are trained over many devices."""
    if not isinstance(optimizer, RowWise):
        raise ValueError(
            "item rows that are split over devices are updated by rows: set "
            'OptimizerConfig(rows="adam") or rows="adagrad"'
        )
    if loss.name == "full":
        raise ValueError(
            "the full softmax scores every item for every target, so that every device would need "
            'all rows in every step; train over many devices with LossConfig("sampled") or "gbce"'
        )
    if loss.per_target:
        raise ValueError(
            "per_target draws negatives by a target's place in its batch, which depends on the "
            "number of devices; use shared negatives (per_target=False), more of them if need be"
        )
    if loss.overarch is not None or overarch_of(model) is not None:
        raise ValueError(
            "a model with an over-arch is trained on one device: train the towers over many "
            "devices first, then the over-arch with OverArchLoss(train_towers=False)"
        )
    if hasattr(model, "moe_layers") and model.moe_layers():
        raise ValueError(
            "a model with experts is trained on one device: its balancing losses and bias are of "
            "one batch, not yet of all devices' batches together"
        )
    return optimizer
