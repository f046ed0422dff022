"""How samples get from rank to rank: in one process's memory, or by collectives over a mesh."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int64

from jaxrec.distributed.balance import Plan
from jaxrec.distributed.sample_buffer import COLUMNS, Samples, join

type Finish[T] = Callable[[], T]
"""Waits for what was started, and returns it."""


@runtime_checkable
class Transport(Protocol):
    """Starts the two exchanges of a balanced batch. Every process must start them in one order.

    Attributes:
      num_ranks: W.
      local_ranks: those that this process reads samples for, rising.
    """

    num_ranks: int
    local_ranks: tuple[int, ...]

    def gather(self, lengths: Int64[np.ndarray, "local K"]) -> Finish[Int64[np.ndarray, "W K"]]:
        """Starts to tell all processes the rows of all ranks."""
        ...

    def move(
        self, samples: Sequence[Samples], lengths: Int64[np.ndarray, "W K"], plan: Plan
    ) -> Finish[list[Samples]]:
        """Starts to send samples to their ranks; gives those of the local ones, as planned.

        Args:
          samples: of each local rank; sample n of the plan is the n-th length above 0.
          lengths: of all ranks' samples, 0 behind each rank's last.
        """
        ...


class InProcess:
    """All ranks are read in this process (which may feed many devices): memory is copied."""

    def __init__(self, num_ranks: int):
        if num_ranks < 1:
            raise ValueError(f"num_ranks is {num_ranks}; expected at least 1")
        self.num_ranks = num_ranks
        self.local_ranks = tuple(range(num_ranks))

    def gather(self, lengths: Int64[np.ndarray, "W K"]) -> Finish[Int64[np.ndarray, "W K"]]:
        """See `Transport`."""
        return lambda: lengths

    def move(
        self, samples: Sequence[Samples], lengths: Int64[np.ndarray, "W K"], plan: Plan
    ) -> Finish[list[Samples]]:
        """See `Transport`."""
        del lengths
        everything = join(samples)
        return lambda: [everything.take(plan.samples_of(rank)) for rank in self.local_ranks]


class OverMesh:
    """One rank a device along a mesh axis: an all-gather of lengths, an all-to-all of samples.

    Both are jitted collectives on the devices. Each pair of ranks has room for as many tokens as
    the busiest pair sends, rounded up to a power of two, which every process works out from the
    plan: nothing overflows, and about log2(T) programs are compiled in all.

    Collectives must be started in the same order in all processes, so start them from one thread,
    the one that dispatches the training step. Waiting for them may be left to another.

    Args:
      mesh, axis: other axes of the mesh have size 1.

    Raises:
      ValueError: the axis is not in the mesh, or another one is larger than 1.

    Cost: 12 bytes a token and pair's padding over the wire, and once to the device and back.
    """

    def __init__(self, mesh: Mesh, axis: str):
        if axis not in mesh.axis_names or mesh.size != mesh.shape[axis]:
            raise ValueError(
                f"expected a mesh whose only axis above size 1 is {axis!r}; it is "
                f"{dict(mesh.shape)}"
            )
        self.num_ranks = mesh.size
        self._devices = list(mesh.devices.flat)
        mine = jax.process_index()
        self.local_ranks = tuple(
            rank for rank, device in enumerate(self._devices) if device.process_index == mine
        )
        self._by_rank = NamedSharding(mesh, PartitionSpec(axis))
        whole = NamedSharding(mesh, PartitionSpec())
        self._gather = jax.jit(lambda rows: rows, out_shardings=whole)
        self._all_to_all = _all_to_all(mesh, axis)

    def gather(self, lengths: Int64[np.ndarray, "local K"]) -> Finish[Int64[np.ndarray, "W K"]]:
        """See `Transport`."""
        rows = self._gather(self._placed(lengths.astype(np.int32)))
        return lambda: np.asarray(rows.addressable_data(0)).astype(np.int64)

    def move(
        self, samples: Sequence[Samples], lengths: Int64[np.ndarray, "W K"], plan: Plan
    ) -> Finish[list[Samples]]:
        """See `Transport`."""
        sources = np.repeat(np.arange(self.num_ranks), (lengths > 0).sum(axis=1))
        flat = lengths[lengths > 0]
        pairs = np.zeros((self.num_ranks, self.num_ranks), np.int64)
        np.add.at(pairs, (sources, plan.ranks), flat)
        room = 1 << max(0, int(pairs.max(initial=1)) - 1).bit_length()
        numbers = np.split(np.arange(len(flat)), np.searchsorted(sources, range(1, self.num_ranks)))
        sent = np.zeros((len(samples), self.num_ranks, room, COLUMNS), np.int32)
        for buffer, own, rank in zip(sent, samples, self.local_ranks, strict=True):
            first = numbers[rank][:1]
            for to in range(self.num_ranks):
                planned = plan.samples_of(to)
                leaving = planned[sources[planned] == rank]
                tokens = own.take(leaving - first).tokens if len(leaving) else own.tokens[:0]
                buffer[to, : len(tokens)] = tokens
        received = self._all_to_all(self._placed(sent))
        return lambda: [
            _arrived(np.asarray(shard.data)[0], flat, sources, plan.samples_of(rank))
            for rank, shard in zip(self.local_ranks, self._shards(received), strict=True)
        ]

    def _placed(self, rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(
            self._by_rank, rows, (self.num_ranks, *rows.shape[1:])
        )

    def _shards(self, array: jax.Array) -> list[jax.Shard]:
        by_device = {shard.device: shard for shard in array.addressable_shards}
        return [by_device[self._devices[rank]] for rank in self.local_ranks]


def _all_to_all(mesh: Mesh, axis: str) -> Callable[[jax.Array], jax.Array]:
    """[source, destination, …] split by source → [destination, source, …] split by destination."""
    spec = PartitionSpec(axis)

    def exchange(sent: jax.Array) -> jax.Array:
        return jnp.swapaxes(jax.lax.all_to_all(sent, axis, split_axis=1, concat_axis=0), 0, 1)

    return jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec))


def _arrived(
    buffers: np.ndarray, lengths: np.ndarray, sources: np.ndarray, planned: np.ndarray
) -> Samples:
    """Puts what came from each source, each in the plan's order, into the plan's order."""
    by_source = np.argsort(sources[planned], kind="stable")
    counts = np.bincount(sources[planned], lengths[planned], len(buffers)).astype(np.int64)
    tokens = [buffer[:count] for buffer, count in zip(buffers, counts, strict=True)]
    arrived = Samples(lengths[planned][by_source], np.concatenate(tokens))
    return arrived.take(np.argsort(by_source, kind="stable"))
