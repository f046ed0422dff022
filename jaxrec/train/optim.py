"""Optimizers and schedules."""

from dataclasses import dataclass

import optax


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam(W) with warm-up, optional cosine decay and clipping by the global norm.

    Attributes:
      decay_steps: steps of the cosine decay down to `final_fraction`; None keeps the rate.
      clip_norm: None clips nothing.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float | None = 5.0


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


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The configured chain: clip, Adam, decoupled weight decay, learning rate."""
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(config.b1, config.b2))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(make_schedule(config)))
