"""What stands on an encoder: heads that make one query a task, and the two-stage model."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxrec.nn.checks import check_at_least
from jaxrec.nn.moe import MoELayer, MoEReport, encode_with_reports
from jaxrec.ops.jagged import JaggedBatch


@dataclass(frozen=True)
class TaskHeadsConfig:
    """Shape of `TaskHeads`.

    Attributes:
      width: of encoder states and item embeddings.
      tasks: their names, in the order of the queries.
      hidden: width of each head's hidden layer.
    """

    width: int
    tasks: tuple[str, ...]
    hidden: int = 64

    def __post_init__(self):
        check_at_least(self, width=1, hidden=1)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(
                f"TaskHeadsConfig.tasks is {self.tasks}; expected one name or more, all different"
            )


class TaskHeads(nnx.Module):
    """One query a task from one encoder state; the item embeddings are shared by all tasks.

        query[t] = state + down[t] · silu(up[t] · state + bias[t])

    `down` starts at zero: every task begins with the encoder's state as its query.
    Cost: 4·T·D·hidden FLOPs a state.
    """

    def __init__(self, config: TaskHeadsConfig, *, rngs: nnx.Rngs):
        self.config = config
        tasks, width, hidden = len(config.tasks), config.width, config.hidden
        shape = (tasks, width, hidden)
        self.up = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((tasks, hidden)))
        self.down = nnx.Param(jnp.zeros((tasks, hidden, width)))

    def __call__(self, state: Float[Array, "*rows D"]) -> Float[Array, "*rows T D"]:
        """The tasks' queries, in the dtype of the state."""
        up, bias, down = (p[...].astype(state.dtype) for p in (self.up, self.bias, self.down))
        hidden = jax.nn.silu(jnp.einsum("...d,tdh->...th", state, up) + bias)
        return state[..., None, :] + jnp.einsum("...th,thd->...td", hidden, down)

    def index(self, task: str) -> int:
        """Position of a task among the queries.

        Raises:
          ValueError: there is no such task.
        """
        if task not in self.config.tasks:
            raise ValueError(f"unknown task {task!r}; known are {', '.join(self.config.tasks)}")
        return self.config.tasks.index(task)


@dataclass(frozen=True)
class TwoStageConfig:
    """Configurations of a `TwoStage` model's parts, for checkpoints and comparisons."""

    towers: Any
    overarch: Any
    heads: Any = None

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.towers.max_len


class TwoStage(nnx.Module):
    """Towers that retrieve by dot product, and an over-arch that re-ranks; trained together.

    Wherever a sequence model is taken, this is one: `encode` and `item_embeddings` are the
    towers'. Training adds the over-arch's loss (see `jaxrec.train.OverArchLoss`).

    Args:
      towers: a model with `config`, `encode` and `item_embeddings`, such as `SASRec`.
      overarch: such as `MixtureOfLogits`; of the towers' width.
      heads: `TaskHeads` for several queries a user; of the towers' width. `jaxrec.train` has no
        loss for them: they are trained by a loss of yours on `heads(hidden)`.

    Raises:
      ValueError: the widths differ.
    """

    def __init__(self, towers: Any, overarch: Any, heads: TaskHeads | None = None):
        for name, part in (("over-arch", overarch), ("heads", heads)):
            if part is not None and towers.config.width != part.config.width:
                raise ValueError(
                    f"the towers' width is {towers.config.width}, the {name}'s "
                    f"{part.config.width}; give both the same"
                )
        own = None if heads is None else heads.config
        self.config = TwoStageConfig(towers.config, overarch.config, own)
        self.towers, self.overarch = towers, overarch
        self.heads = nnx.data(None) if heads is None else heads

    def encode(self, batch: JaggedBatch, *, key: jax.Array | None = None) -> Float[Array, "T D"]:
        """The towers' hidden states."""
        return self.towers.encode(batch, key=key)

    def encode_with_reports(
        self, batch: JaggedBatch, *, key: jax.Array | None = None
    ) -> tuple[Float[Array, "T D"], tuple[MoEReport, ...]]:
        """`encode`, and the reports of the towers' experts."""
        return encode_with_reports(self.towers, batch, key=key)

    def moe_layers(self) -> list[MoELayer]:
        """The towers' experts, in the order of their reports."""
        return self.towers.moe_layers()

    def item_embeddings(self) -> Float[Array, "V D"]:
        """The towers' item embeddings."""
        return self.towers.item_embeddings()


def overarch_of(model: Any) -> Any | None:
    """The model's over-arch, or None if it has none."""
    return getattr(model, "overarch", None)
