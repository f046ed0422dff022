"""The step of a model whose item rows are split over devices.

Each device names the items of its histories and targets, and the negatives that all devices share:
a catalogue of its own, as in a row-wise step on one device. Their rows come from the devices that
keep them; the model runs on the catalogue; the rows' gradients go back. Negatives are a function
of the run's seed and the step, so that neither the number of devices nor the balance changes them,
and the loss is the mean over all devices' targets: the step is that of one device with the whole
global batch, but for the order of sums and for dropout, whose masks each device draws itself.

Letters: W devices, N items that a device names at most, S negatives, T tokens, V items.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxrec.distributed import (
    EmbeddingTable,
    GrowingStep,
    PipelineState,
    PrioritizedStep,
    ShardedState,
    ShardedTables,
    make_sharded_step,
)
from jaxrec.distributed.global_mean import share_of_targets
from jaxrec.functional import split_params
from jaxrec.nn import ItemAttributeIds
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.ops.row_store import read_rows
from jaxrec.train.objective import LossConfig, Negatives, Sampler, batch_loss, draw_negatives
from jaxrec.train.parallel_batches import PreparedBatch, RankBatch, StepInput
from jaxrec.train.row_wise import RowWise, clipped, name_rows, split_items, with_items
from jaxrec.train.step import StepMetrics, num_pairs
from jaxrec.typing import PADDING_ID, PyTree

ITEMS = "items"
"""Name of the table of item rows."""

type ParallelState = ShardedState | PipelineState


def make_prepare(
    tables: ShardedTables,
    loss: LossConfig,
    sampler: Sampler,
    schedule: optax.Schedule,
    *,
    seed: int,
) -> Callable[[int, JaggedBatch], PreparedBatch]:
    """Makes what turns a step's number and its batch, ranks in front, into what the step needs.

    Args:
      tables: with the table `ITEMS`.
      seed: of the negatives and dropout; a step on one device with this seed has these negatives.
    """
    key_data = np.asarray(jax.random.key_data(jax.random.key(seed, impl="rbg")))
    num_rows, axis = tables.tables[ITEMS].num_rows, tables.axis
    sampler = jax.tree.map(np.asarray, sampler)

    def on_each_rank(number: Array, batch: JaggedBatch, sampler: Sampler) -> tuple[Array, Any]:
        batch = jax.tree.map(lambda x: x[0], batch)
        key = jax.random.fold_in(
            jax.random.wrap_key_data(jnp.asarray(key_data), impl="rbg"), number
        )
        dropout_key, negatives_key = jax.random.split(key)
        dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(axis))
        drawn, _ = draw_negatives(
            loss, negatives_key, (sampler, sampler), batch.target_ids.shape[0]
        )
        named = name_rows(batch, (drawn, None), num_rows)
        negatives = named.negatives[0]
        assert negatives is not None
        ids = jnp.where(named.rows < num_rows, named.rows, PADDING_ID)
        own = RankBatch(
            named.rows, named.batch, negatives.ids, negatives.log_q,
            jax.random.key_data(dropout_key),
        )  # fmt: skip
        return jax.tree.map(lambda x: x[None], (ids, own))

    split, whole = PartitionSpec(tables.axis), PartitionSpec()
    local = tables.on_devices(on_each_rank, in_specs=(whole, split, whole))

    @jax.jit
    def prepare(number: Array, batch: JaggedBatch, sampler: Sampler) -> PreparedBatch:
        ids, ranks = local(number, batch, sampler)
        return PreparedBatch(ids, ranks, jnp.asarray(schedule(number), jnp.float32))

    return lambda step, batch: prepare(np.int32(step), batch, sampler)


class _Counts(NamedTuple):
    """Of all devices' batches; f32 or i32 scalars, as in `StepMetrics`."""

    tokens: Array
    targets: Array
    pairs: Array


def make_loss(
    model: Any, tables: ShardedTables, config: LossConfig
) -> Callable[[PyTree, dict[str, Array], RankBatch], tuple[Array, _Counts]]:
    """The loss of all devices' batches from dense weights and the rows that each device names."""
    rebuild, weights = split_params(model)
    num_items = tables.tables[ITEMS].num_rows - 1
    attributes = jax.tree.map(np.asarray, nnx.state(model, ItemAttributeIds))
    axis = tables.axis

    def on_each_rank(params: PyTree, rows: Array, ranks: RankBatch) -> tuple[Array, _Counts]:
        rows, own = jax.tree.map(lambda x: x[0], (rows, ranks))
        named = jax.tree.map(lambda x: read_rows(jnp.asarray(x), own.rows), attributes)
        module = rebuild(nnx.merge_state(with_items(weights, params, rows), named))
        negatives = Negatives(own.negatives, own.log_q)
        key = jax.random.wrap_key_data(own.dropout_key, impl="rbg")
        value, _ = batch_loss(
            module, config, own.batch, (negatives, None), num_items=num_items, dropout_key=key
        )
        offsets = jnp.asarray(own.batch.seq_offsets)
        targets = (jnp.asarray(own.batch.target_ids) != PADDING_ID).sum()
        counts = _Counts(offsets[-1], targets, num_pairs(offsets))
        return jax.lax.psum((share_of_targets(own.batch, axis) * value, counts), axis)

    split, whole = PartitionSpec(axis), PartitionSpec()
    mean = tables.on_devices(on_each_rank, in_specs=(whole, split, split), out_specs=whole)
    return lambda params, embeddings, ranks: mean(params, embeddings[ITEMS], ranks)


def item_table(model: Any, optimizer: RowWise) -> EmbeddingTable:
    """The model's item rows as a table to be split."""
    _, rows = split_items(nnx.state(model, nnx.Param))
    return EmbeddingTable(ITEMS, *rows.shape, optimizer=optimizer.rows)


def dense_optimizer(optimizer: RowWise) -> optax.GradientTransformation:
    """That of the weights other than item rows; clipping is by their own norm."""
    others, clip_norm = optimizer.others, optimizer.clip_norm
    if clip_norm is None:
        return others

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        return others.update(clipped(updates, clip_norm), state, params)

    return optax.GradientTransformation(others.init, update)


class ParallelStep:
    """Steps on all devices, prioritised or not; what does not fit an exchange is repeated.

    Between prioritised steps the state is a `PipelineState`; `settled` completes it.
    """

    def __init__(
        self,
        tables: ShardedTables,
        loss: Callable[..., tuple[Array, _Counts]],
        optimizer: optax.GradientTransformation,
        *,
        prioritized: bool,
    ):
        self._tables, self._loss, self._optimizer = tables, loss, optimizer
        self._plain: GrowingStep | None = None
        self._pipeline = PrioritizedStep(tables, loss, optimizer) if prioritized else None

    def __call__(self, state: ParallelState, given: StepInput) -> tuple[ParallelState, StepMetrics]:
        """Trains on the batch given, and fetches the one that follows; the state is donated."""
        batch, following = given
        if self._pipeline is None:
            state, metrics = self._growing(batch)(state, {ITEMS: batch.ids}, batch.ranks)
        else:
            if isinstance(state, ShardedState):
                state = self._pipeline.start(state, {ITEMS: batch.ids}, batch.ranks)
            assert following is not None  # the batches of a run never end
            state, metrics = self._pipeline(state, {ITEMS: following.ids}, following.ranks)
        counts = metrics.aux
        return state, StepMetrics(
            loss=metrics.loss,
            grad_norm=metrics.gradients.norm,
            num_tokens=counts.tokens,
            num_targets=counts.targets,
            num_pairs=counts.pairs,
            learning_rate=batch.learning_rate,
            nonfinite=metrics.gradients.nonfinite,
        )

    @property
    def retries(self) -> int:
        """Steps repeated with a larger exchange."""
        steps = self._plain if self._pipeline is None else self._pipeline
        return 0 if steps is None else steps.retries

    def settled(self, state: ParallelState) -> ShardedState:
        """The state with nothing under way; the one given is donated, and steps go on from this."""
        if isinstance(state, ShardedState):
            return state
        assert self._pipeline is not None
        return self._pipeline.settle(state)

    def _growing(self, batch: PreparedBatch) -> GrowingStep:
        if self._plain is None:
            parts = self._tables, self._loss, self._optimizer
            self._plain = GrowingStep(
                self._tables,
                lambda capacity: make_sharded_step(*parts, capacity),
                self._tables.start_capacity({ITEMS: batch.ids}),
            )
        return self._plain
