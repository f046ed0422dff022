"""The mean over all ranks' targets, whichever rank has how many."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from jaxrec.ops.jagged import JaggedBatch
from jaxrec.typing import PADDING_ID, PyTree


def global_mean(
    loss: Callable[[PyTree, JaggedBatch], jax.Array], mesh: Mesh, axis: str
) -> Callable[[PyTree, JaggedBatch], Float[jax.Array, ""]]:
    """Makes a loss of one rank's batch into that of all ranks' batches together.

    A mean over ranks would weigh a target by how few others its rank has, so that balancing,
    which gives ranks different numbers of samples, would move the optimum. Here every rank's mean
    is weighted with its share of all targets: value and gradient are those of one batch with all
    samples, however they are spread. A rank without samples adds nothing.

    Args:
      loss: (params, batch) → the mean over the batch's targets that are not padding; finite for a
        batch without any.
      mesh, axis: ranks; params are whole on each.

    Returns:
      A function of params and batches with the ranks in front (item_ids i32[W, T] and so on),
      to be differentiated by params.
    """
    rows, whole = PartitionSpec(axis), PartitionSpec()

    def on_each_rank(params: PyTree, batches: JaggedBatch) -> jax.Array:
        batch = jax.tree.map(lambda array: array[0], batches)
        return jax.lax.psum(share_of_targets(batch, axis) * loss(params, batch), axis)

    return jax.shard_map(
        on_each_rank, mesh=mesh, in_specs=(whole, rows), out_specs=whole, check_vma=False
    )


def share_of_targets(batch: JaggedBatch, axis: str | tuple[str, ...]) -> Float[jax.Array, ""]:
    """A rank's share of all ranks' targets; inside `jax.shard_map`, of the rank's own batch."""
    targets = (jnp.asarray(batch.target_ids) != PADDING_ID).sum().astype(jnp.float32)
    return targets / jnp.maximum(jax.lax.psum(targets, axis), 1)
