"""Optimizers and schedules."""

from dataclasses import dataclass
from typing import Literal

import optax

from jaxrec.ops.row_optimizers import RowAdagrad, RowAdam
from jaxrec.train.row_wise import RowWise


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam(W) with warm-up, optional cosine decay and clipping by the global norm.

    Attributes:
      learning_rate: the highest, after warm-up.
      warmup_steps: steps of linear warm-up from 0.
      decay_steps: steps of the cosine decay after warm-up, down to `final_fraction` of the
        rate; None keeps the rate.
      weight_decay: decoupled, on every parameter.
      clip_norm: None clips nothing.
      rows: None updates all item rows in every step. "adam" and "adagrad" update only those that
        the step names (see `RowWise`), for catalogues of millions: no row decays, and a row's
        moments know only its own steps. "adam" has this configuration's b1 and b2 and 8·D + 4 bytes
        of moments a row, "adagrad" 4 bytes.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float | None = 5.0
    rows: Literal["adam", "adagrad"] | None = None

    def __post_init__(self):
        checks = {
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "decay_steps": (self.decay_steps is None or self.decay_steps >= 1, "None, or 1 up"),
            "final_fraction": (0 <= self.final_fraction <= 1, "0 to 1"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "b1": (0 <= self.b1 < 1, "from 0, below 1"),
            "b2": (0 <= self.b2 < 1, "from 0, below 1"),
            "rows": (self.rows in (None, "adam", "adagrad"), "None, adam or adagrad"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "None, or above 0"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant or cosine."""
    if config.decay_steps is not None:
        return optax.warmup_cosine_decay_schedule(
            0.0 if config.warmup_steps else config.learning_rate,
            config.learning_rate,
            config.warmup_steps,
            config.warmup_steps + config.decay_steps,
            config.learning_rate * config.final_fraction,
        )
    if config.warmup_steps:
        return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.constant_schedule(config.learning_rate)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation | RowWise:
    """The configured chain: clip, Adam, decoupled weight decay, learning rate."""
    schedule = make_schedule(config)
    parts = [optax.scale_by_adam(config.b1, config.b2)]
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    parts.append(optax.scale_by_learning_rate(schedule))
    if config.rows is not None:
        rows = (
            RowAdagrad(schedule)
            if config.rows == "adagrad"
            else RowAdam(schedule, config.b1, config.b2)
        )
        return RowWise(rows, optax.chain(*parts), config.clip_norm)
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*parts)
