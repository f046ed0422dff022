"""Meshes and placements."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxrec.typing import PyTree


def make_mesh(axes: Mapping[str, int], *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the named sizes, over the first devices that there are.

    Axes are Auto: the compiler places what is not said, and unplaced inputs are accepted.

    Args:
      axes: size by name, outermost first, such as {"data": 4, "model": 2}.
      devices: to choose from; None takes all devices.

    Raises:
      ValueError: no axis, a size below 1, or fewer devices than the sizes multiply to.
    """
    if not axes or min(axes.values()) < 1:
        raise ValueError(f"axes is {dict(axes)}; expected at least one axis, each of size 1 or up")
    available = jax.devices() if devices is None else list(devices)
    wanted = math.prod(axes.values())
    if wanted > len(available):
        raise ValueError(
            f"a mesh of {' × '.join(f'{name}={size}' for name, size in axes.items())} needs "
            f"{wanted} devices, but there are {len(available)} ({available[0].platform}). Choose "
            "smaller axes; for trying out on a CPU set jax_num_cpu_devices."
        )
    shape, names = tuple(axes.values()), tuple(axes)
    types = (AxisType.Auto,) * len(names)
    if wanted == len(available):  # JAX may then order them by how they are connected
        return jax.make_mesh(shape, names, axis_types=types, devices=available)
    return Mesh(np.array(available[:wanted]).reshape(shape), names, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded_rows(mesh: Mesh, axis: str) -> NamedSharding:
    """The first dimension split over `axis`, in equal parts; the others whole."""
    if axis not in mesh.axis_names:
        raise ValueError(f"the mesh has no axis {axis!r}; it has {', '.join(mesh.axis_names)}")
    return NamedSharding(mesh, PartitionSpec(axis))


def abstract_like(tree: PyTree, sharding: Sharding | Callable[[Any], Sharding]) -> PyTree:
    """Shapes and dtypes of `tree`, to be placed by `sharding`: what a restore asks for.

    Args:
      tree: arrays, or what `jax.eval_shape` returns.
      sharding: one for every leaf, or a function from a leaf to its own.
    """

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        placed = sharding if isinstance(sharding, Sharding) else sharding(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    return jax.tree.map(abstract, tree)
