"""How well a device is used: tokens and model FLOPs a second, their share of its peak, memory."""

import resource
import sys
from typing import Any, NamedTuple

import jax

from jaxrec.nn import forward_flops
from jaxrec.train.objective import LossConfig

_PEAK_TFLOPS = {  # dense bf16, from the makers' data sheets
    "A100": 312.0,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
}


class TrainingFlops(NamedTuple):
    """Model FLOPs of a step, forward and gradient: three times the forward pass.

    Attributes:
      token, pair: see `jaxrec.nn.ForwardFlops`.
      target: for each target, of the loss.
    """

    token: float
    pair: float
    target: float

    def of(self, *, tokens: float | int, pairs: float | int, targets: float | int) -> float | int:
        """Of so many."""
        return self.token * tokens + self.pair * pairs + self.target * targets


def training_flops(config: Any, loss: LossConfig, num_items: int) -> TrainingFlops | None:
    """Of a model with this configuration; None for one whose FLOPs are not known.

    An over-arch's own are left out.
    """
    forward = forward_flops(config)
    if forward is None:
        return None
    width = getattr(config, "towers", config).width
    scored = num_items if loss.name == "full" else 1 + loss.num_negatives
    return TrainingFlops(3 * forward.token, 3 * forward.pair, 6 * scored * width)


def peak_flops(device: Any = None) -> float | None:
    """The device's dense bf16 rate, of its maker's data sheet; None where it is not known."""
    words = (device or jax.devices()[0]).device_kind.replace("-", " ").split()
    return next((1e12 * _PEAK_TFLOPS[word] for word in words if word in _PEAK_TFLOPS), None)


def memory_bytes() -> int:
    """The most memory in use so far: of the first device, or of this process where it has none."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return own if sys.platform == "darwin" else 1024 * own


def speed_figures(
    seconds: float | int,
    *,
    tokens: float | int,
    pairs: float | int,
    targets: float | int,
    flops: TrainingFlops | None,
) -> dict[str, float]:
    """What the progress line shows of a stretch of training.

    Returns:
      tokens/s; GFLOP/s where the model's FLOPs are known, and "MFU %", their share of all devices'
      peak, where that is known; memory in GB.
    """
    seconds = max(seconds, 1e-9)
    figures = {"tokens/s": tokens / seconds}
    if flops is not None:
        rate = flops.of(tokens=tokens, pairs=pairs, targets=targets) / seconds
        figures["GFLOP/s"] = rate / 1e9
        if (peak := peak_flops()) is not None:
            figures["MFU %"] = 100 * rate / (peak * jax.device_count())
    return figures | {"memory GB": memory_bytes() / 1e9}
