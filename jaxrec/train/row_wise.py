"""Training item rows by an optimizer that touches only those that a step names.

A step names the items of its histories, targets and negatives. Their rows, each once, are a
catalogue of their own: the model runs on it as on the whole one, its gradient is as large as they
are, and their new values are written back in place. Nothing in the step is as large as the table.

Letters: V rows of the table, N rows that a step may name, D width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxrec.nn import ItemAttributeIds, ItemRows
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.ops.row_optimizers import Moments, RowOptimizer, rate_at
from jaxrec.ops.row_runs import number_distinct
from jaxrec.ops.row_store import read_rows, write_rows
from jaxrec.train.objective import Negatives
from jaxrec.typing import PADDING_ID, PyTree

type NegativesPair = tuple[Negatives | None, Negatives | None]


class RowWiseState(NamedTuple):
    """State of a `RowWise` optimizer: of the other weights, and of item rows."""

    others: PyTree
    moments: Moments


@dataclass(frozen=True)
class RowWise:
    """Item rows by one optimizer, those of a step alone; all other weights by another.

    Attributes:
      rows: such as `RowAdam` or `RowAdagrad`; a row that no step names never changes.
      others: of all weights but the item rows.
      clip_norm: the largest norm of the whole gradient; None clips nothing.
    """

    rows: RowOptimizer
    others: optax.GradientTransformation
    clip_norm: float | None = None

    def init(self, weights: PyTree) -> RowWiseState:
        """The state before the first step.

        Raises:
          ValueError: the weights hold no item rows, or several tables of them.
        """
        others, table = split_items(weights)
        return RowWiseState(self.others.init(others), self.rows.moments(*table.shape))

    def update(
        self, grads: PyTree, state: RowWiseState, weights: PyTree, step: Array
    ) -> tuple[PyTree, RowWiseState]:
        """Next weights and state, of the items that the step named.

        Args:
          step: its number, for the learning rate of the rows.
        """
        if self.clip_norm is not None:
            grads = clipped(grads, self.clip_norm)
        (d_others, d_rows), (others, rows) = split_items(grads), split_items(weights)
        updates, others_state = self.others.update(d_others, state.others, others)
        rate = rate_at(self.rows, step)
        rows, moments = self.rows.update(rows, state.moments, d_rows, rate)
        new = with_items(weights, optax.apply_updates(others, updates), rows)
        return new, RowWiseState(others_state, moments)


def clipped(grads: PyTree, clip_norm: float) -> PyTree:
    """Gradients scaled down to a norm of at most `clip_norm`."""
    norm = optax.tree.norm(grads)
    scale = jnp.where(norm > clip_norm, clip_norm / norm, 1.0)
    return jax.tree.map(lambda g: g * scale, grads)


class Part(NamedTuple):
    """What a step works on: everything, or the items that it names as a catalogue of their own.

    Attributes:
      batch, negatives: name items by their place in `rows`.
      weights, opt_state: with these rows alone.
      rows: their numbers in the whole catalogue, rising, the first padding, V behind the last; None
        for all, in their order.
    """

    batch: JaggedBatch
    negatives: NegativesPair
    weights: PyTree
    opt_state: Any
    rows: Int32[Array, "N"] | None = None

    def attributes(self, model: nnx.Module) -> PyTree:
        """Attribute numbers of these items, for the model in place of all items'."""
        ids = nnx.state(model, ItemAttributeIds)
        rows = self.rows
        return ids if rows is None else jax.tree.map(lambda x: read_rows(x, rows), ids)


class Named(NamedTuple):
    """The items that a step names, as a catalogue of their own.

    Attributes:
      rows: their numbers in the whole catalogue, rising, the first padding, V behind the last.
      batch, negatives: name items by their place in `rows`.
    """

    rows: Int32[Array, "N"]
    batch: JaggedBatch
    negatives: NegativesPair


def name_rows(batch: JaggedBatch, negatives: NegativesPair, num_rows: int) -> Named:
    """The items of a batch and its negatives; N is 1 + all tokens, targets and negatives.

    Args:
      num_rows: V.

    Cost: a sort of N numbers.
    """
    drawn = [own.ids for own in negatives if own is not None]
    padding = jnp.full(1, PADDING_ID, jnp.int32)
    named = [padding, *map(jnp.asarray, (batch.item_ids, batch.target_ids, *drawn))]
    keys = jnp.concatenate([ids.reshape(-1) for ids in named])
    rows, places = number_distinct(keys, num_rows)
    ends = np.cumsum([ids.size for ids in named])[:-1]
    found = zip(jnp.split(places, ends), named, strict=True)
    _, item_ids, target_ids, *placed = [places.reshape(ids.shape) for places, ids in found]
    waiting = iter(placed)
    first, second = (
        None if own is None else Negatives(next(waiting), read_rows(own.log_q, rows))
        for own in negatives
    )
    batch = batch._replace(item_ids=item_ids, target_ids=target_ids)
    return Named(rows, batch, (first, second))


def select_rows(
    weights: PyTree, opt_state: RowWiseState, batch: JaggedBatch, negatives: NegativesPair
) -> Part:
    """What a step needs; N is 1 + all tokens, targets and negatives.

    Cost: a sort of N numbers; N rows and their moments are read.
    """
    others, table = split_items(weights)
    rows, batch, negatives = name_rows(batch, negatives, table.shape[0])
    moments = tuple(read_rows(moment, rows) for moment in opt_state.moments)
    return Part(
        batch,
        negatives,
        with_items(weights, others, read_rows(table, rows)),
        RowWiseState(opt_state.others, moments),
        rows,
    )


def store_rows(
    weights: PyTree, opt_state: RowWiseState, rows: Int32[Array, "N"], new: tuple[PyTree, Any]
) -> tuple[PyTree, RowWiseState]:
    """All weights and states with the new ones of some rows, in place where they are donated."""
    _, table = split_items(weights)
    (others, own), (others_state, moments) = split_items(new[0]), new[1]
    pairs = zip(opt_state.moments, moments, strict=True)
    moments = tuple(write_rows(whole, rows, part) for whole, part in pairs)
    table = write_rows(table, rows, own)
    return with_items(weights, others, table), RowWiseState(others_state, moments)


def split_items(weights: PyTree) -> tuple[PyTree, Float[Array, "rows D"]]:
    """(all other weights, the table of item rows)."""
    items, others = nnx.split_state(weights, ItemRows, ...)
    tables = jax.tree.leaves(items)
    if len(tables) != 1:
        raise ValueError(
            f"the model has {len(tables)} tables of item rows (weights of type ItemRows, as "
            "ItemEmbedding holds them); updating rows alone needs exactly one"
        )
    return others, tables[0]


def with_items(like: PyTree, others: PyTree, rows: Any) -> PyTree:
    """Weights built as `like` from other weights and item rows."""
    items, _ = nnx.split_state(like, ItemRows, ...)
    return nnx.merge_state(others, jax.tree.map(lambda _: rows, items))
