"""What training minimises: the configured losses of a batch, and the negatives they draw."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxrec.data import PopularitySampler, UniformSampler
from jaxrec.nn import MoEReport, encode_with_reports
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.ops.losses import (
    full_softmax_loss,
    gbce_loss,
    sampled_softmax_loss,
    scored_softmax_loss,
    usable_negatives,
)

type Sampler = UniformSampler | PopularitySampler


@dataclass(frozen=True)
class OverArchLoss:
    """How an over-arch is trained beside its towers: a sampled softmax over its own scores.

    Attributes:
      weight: of this loss; the towers' has 1.
      num_negatives: items drawn, shared by the batch.
      negatives: "uniform", or "popularity" (count + 1) ** 0.75; the loss corrects for either.
      train_towers: whether its gradient reaches the towers; False trains the over-arch alone.
    """

    weight: float = 1.0
    num_negatives: int = 256
    negatives: Literal["uniform", "popularity"] = "uniform"
    train_towers: bool = True

    def __post_init__(self):
        if self.negatives not in ("uniform", "popularity"):
            raise ValueError(
                f"unknown negatives {self.negatives!r}; expected uniform or popularity"
            )
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives is {self.num_negatives}; expected at least 1")
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}; expected a number above 0")


@dataclass(frozen=True)
class LossConfig:
    """Which loss, and its negatives.

    Attributes:
      name: "full" softmax, "sampled" softmax or "gbce".
      num_negatives: items drawn, shared by the batch unless `per_target`.
      negatives: "uniform", or "popularity" (count + 1) ** 0.75; the sampled softmax corrects for
        either.
      per_target: draws negatives for every target on its own.
      temperature: scores are divided by it.
      calibration: gBCE's t.
      overarch: loss of the model's over-arch, added to this; None for a model without one.
    """

    name: Literal["full", "sampled", "gbce"] = "full"
    num_negatives: int = 256
    negatives: Literal["uniform", "popularity"] = "uniform"
    per_target: bool = False
    temperature: float = 1.0
    calibration: float = 0.75
    overarch: OverArchLoss | None = None

    def __post_init__(self):
        if self.name not in ("full", "sampled", "gbce"):
            raise ValueError(f"unknown loss {self.name!r}; expected full, sampled or gbce")
        if self.negatives not in ("uniform", "popularity"):
            raise ValueError(
                f"unknown negatives {self.negatives!r}; expected uniform or popularity"
            )
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives is {self.num_negatives}; expected at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; expected a number above 0")
        if not 0 <= self.calibration <= 1:
            raise ValueError(f"calibration is {self.calibration}; expected 0 to 1")


class Negatives(NamedTuple):
    """Items drawn for a batch.

    Attributes:
      ids: [S], shared by all targets, or [M, S].
      log_q: log of each item's probability; [V].
    """

    ids: Int[jax.Array, "*negatives"]
    log_q: Float[jax.Array, "V"]


def draw_negatives(
    config: LossConfig, keys: jax.Array, samplers: tuple[Sampler, Sampler], num_targets: int
) -> tuple[Negatives | None, Negatives | None]:
    """Those of the loss and of the over-arch's; None where a loss draws none.

    Args:
      keys: one for both.
      samplers: of the loss, and of the over-arch's.
    """
    own, other = None, None
    if config.name != "full":
        shape = (config.num_negatives,)
        shape = (num_targets, *shape) if config.per_target else shape
        own = Negatives(samplers[0].draw(keys, shape), jnp.asarray(samplers[0].log_q))
    if config.overarch is not None:
        shape = (config.overarch.num_negatives,)
        drawn = samplers[1].draw(jax.random.fold_in(keys, 1), shape)
        other = Negatives(drawn, jnp.asarray(samplers[1].log_q))
    return own, other


def batch_loss(
    module: Any,
    config: LossConfig,
    batch: JaggedBatch,
    negatives: tuple[Negatives | None, Negatives | None],
    *,
    num_items: int,
    dropout_key: jax.Array | None,
) -> tuple[Float[jax.Array, ""], tuple[MoEReport, ...]]:
    """All losses of a batch, and the reports of its routers.

    Args:
      module: anything with `encode` and `item_embeddings`.
      num_items: of the catalogue, of which the module may hold only the items that are named here.
    """
    with jax.named_scope("encode"):
        hidden, reports = encode_with_reports(module, batch, key=dropout_key)
        hidden = hidden[jnp.asarray(batch.target_positions)]
        table, target_ids = module.item_embeddings(), jnp.asarray(batch.target_ids)
    with jax.named_scope("loss"):
        value = target_loss(config, hidden, table, target_ids, negatives[0], num_items=num_items)
        value = sum((report.loss for report in reports), value)
    if config.overarch is not None and negatives[1] is not None:
        items = table.astype(hidden.dtype)
        with jax.named_scope("overarch"):
            value += overarch_loss(
                config.overarch, module.overarch, hidden, items, target_ids, negatives[1]
            )
    return value, reports


def target_loss(
    config: LossConfig,
    hidden: Float[jax.Array, "M D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "M"],
    negatives: Negatives | None,
    *,
    num_items: int | None = None,
) -> Float[jax.Array, ""]:
    """The configured loss; the full softmax has no negatives."""
    hidden = hidden / config.temperature
    if negatives is None:
        return full_softmax_loss(hidden, table, target_ids)
    if config.name == "sampled":
        return sampled_softmax_loss(hidden, table, target_ids, negatives.ids, log_q=negatives.log_q)
    return gbce_loss(
        hidden,
        table,
        target_ids,
        negatives.ids,
        calibration=config.calibration,
        num_items=num_items,
    )


def overarch_loss(
    config: OverArchLoss,
    overarch: Any,
    hidden: Float[jax.Array, "M D"],
    table: Float[jax.Array, "V D"],
    target_ids: Int[jax.Array, "M"],
    drawn: Negatives,
) -> Float[jax.Array, ""]:
    """Sampled softmax with the over-arch as the similarity.

    Pointwise over-archs score the shared negatives once for all; a listwise one scores each
    target together with the negatives, first in a list whose order it does not see.
    """
    if not config.train_towers:
        hidden, table = jax.lax.stop_gradient((hidden, table))
    negatives = drawn.ids
    usable = usable_negatives(target_ids, negatives)
    components = overarch.item_components(table)
    target = jax.tree.map(lambda column: column[target_ids][:, None], components)
    shared = jax.tree.map(lambda column: column[negatives][None], components)
    present = jnp.ones((*target_ids.shape, 1), bool)
    if overarch.listwise:
        beside = jax.tree.map(
            lambda s, t: jnp.broadcast_to(s, (*t.shape[:1], *s.shape[1:])), shared, target
        )
        listed = jax.tree.map(lambda t, s: jnp.concatenate([t, s], axis=1), target, beside)
        scores = overarch(hidden, listed, jnp.concatenate([present, usable], axis=1))
        target_scores, negative_scores = scores[:, 0], scores[:, 1:]
    else:
        target_scores = overarch(hidden, target, present)[:, 0]
        negative_scores = overarch(hidden, shared, usable)
    loss = scored_softmax_loss(
        target_scores, negative_scores, target_ids, negatives, log_q=drawn.log_q
    )
    return config.weight * loss
