"""Models with their experts split over devices."""

from collections.abc import Collection
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxrec.nn.moe import Experts
from jaxrec.ops.expert_parallel import ExpertParallel
from jaxrec.sharding import replicated, sharded_rows


def split_experts(
    model: nnx.Module,
    mesh: Mesh,
    *,
    axis: str = "expert",
    token_axes: tuple[str, ...] | None = None,
    capacity_factor: float | None = None,
) -> None:
    """Splits the experts of every `MoELayer` in the model over a mesh axis, in place.

    Each device gets E / S experts, their biases, and a copy of all else: routers, shared experts,
    the rest of the model. A layer's call stays what it was, on tokens that are split over
    `token_axes`: same outputs, same gradients, same report, up to the order of sums. Inside,
    `split_ffn` exchanges tokens. With the latency-hiding scheduler (jit's compiler option
    `xla_gpu_enable_latency_hiding_scheduler`) the shared expert's first product runs beside the
    tokens' journey to their experts and its second beside the one back, and so do the gradients.

        split_experts(model, make_mesh({"expert": 8}))
        batch = jax.device_put(batch, sharded_rows(mesh, "expert"))

    Args:
      model: anything with `MoELayer`s inside, or one.
      mesh, axis, token_axes: see `ExpertParallel`.
      capacity_factor: None leaves room for whatever the router does: no pair is ever lost, and a
        device's buffers have rows for the tokens of all devices. With a number they have
        capacity_factor · K rows a token (fewer where that is more than S); then pairs may be lost,
        and `RouterStats.dropped` counts them: if it is not 0, raise the factor, or balance the
        router.

    Raises:
      ValueError: there is no `MoELayer`, the axis is not in the mesh or does not divide a layer's
        experts, a capacity_factor of 0 or less. The model is as before.
    """
    parallel = ExpertParallel(mesh, axis, token_axes, capacity_factor)
    found = {
        path: module for path, module in nnx.iter_modules(model) if isinstance(module, Experts)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no MoELayer whose experts could be split")
    for path, experts in found.items():
        owner = ".".join(map(str, path)) or "the model"
        parallel.check_experts(experts.config.num_experts, owner)
    whole, split = replicated(mesh), sharded_rows(mesh, axis)
    placed: Any = [
        (path, jax.device_put(leaf, split if _inside(path, found) else whole))
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    ]
    nnx.update(model, nnx.from_flat_state(placed))
    for experts in found.values():
        experts.parallel = parallel


def _inside(path: tuple[Any, ...], owners: Collection[tuple[Any, ...]]) -> bool:
    return any(path[: len(owner)] == owner for owner in owners)
