"""Backend choice, written once: no name means the best supported one, a name never falls back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

type Backend = Literal["xla", "mosaic_gpu", "cudnn"]

_HOPPER = 90
_KIND_CAPABILITY = {"H100": 90, "H200": 90, "GH200": 90, "B200": 100, "GB200": 100}


class BackendError(ValueError):
    """A backend was asked for by name and cannot run here."""


def resolve(
    op: str,
    backend: str | None,
    shape_problem: Callable[[], str | None],
    *,
    kernel: Literal["mosaic_gpu", "cudnn"] = "mosaic_gpu",
    wgmma: bool = False,
) -> Backend:
    """The backend that `op` runs on: "xla" or its `kernel`.

    The target is the device of the surrounding abstract mesh if there is one (a device-less compile
    sets it), else JAX's default device.

    Args:
      op: public name of the operation, for the error message.
      backend: None takes the kernel where it is supported, else "xla".
      shape_problem: says what keeps the kernel from these shapes and dtypes, or None; called only
        where the device could run it.
      kernel: what the op has beside XLA.
      wgmma: the kernel uses Hopper's matrix instructions, which later GPUs lack.

    Raises:
      BackendError: the name is unknown, or the named backend cannot run this call.
    """
    if backend not in (None, "xla", kernel):
        raise BackendError(
            f"{op}: unknown backend {backend!r}; expected 'xla', {kernel!r} or None (the best)."
        )
    if backend == "xla":
        return "xla"
    problem = _device_problem(wgmma) or shape_problem()
    if problem is None:
        return kernel
    if backend is None:
        return "xla"
    raise BackendError(
        f"{op}: backend {kernel!r} cannot run this call: {problem}. "
        "Pass backend=None for the best supported backend, or backend='xla'."
    )


def tuned_file(folder: Path, name: str) -> Path:
    """Where a folder of tuned choices keeps those for this kind of device."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "_")
    return folder / kind / name


def _device_problem(wgmma: bool) -> str | None:
    platform, kind, capability = _target()
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU of compute capability 9.0, and the target is {kind!r}"
    if capability is None or capability < _HOPPER or (wgmma and capability != _HOPPER):
        wanted = "9.0" if wgmma else "9.0 or later"
        return f"it needs compute capability {wanted}, and the target is {kind!r} ({capability})"
    return None


def _target() -> tuple[str, str, int | None]:
    """Platform, device kind and compute capability (times ten) of the target device."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        words = abstract.device_kind.split()
        known = [_KIND_CAPABILITY[word] for word in words if word in _KIND_CAPABILITY]
        return abstract.platform, abstract.device_kind, known[0] if known else None
    device = _default_device()
    version = getattr(device, "compute_capability", None)
    capability = round(float(version) * 10) if version else None
    return device.platform, device.device_kind, capability


def _default_device() -> Any:
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None:
        return jax.devices()[0]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen
