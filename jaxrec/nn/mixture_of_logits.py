"""Mixture of Logits: a learned similarity made of many small dot products."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.nn.checks import check_at_least
from jaxrec.nn.layers import Linear
from jaxrec.nn.overarch import ResidualOverArch
from jaxrec.ops.overarch import CrossGate, l2_normalise, mixture_of_logits


@dataclass(frozen=True)
class MixtureOfLogitsConfig:
    """Shape of a `MixtureOfLogits`.

    Attributes:
      width: of queries and item embeddings.
      query_components, item_components: vectors that each side is projected to.
      own_components: further item components with a row of their own for each item, learned
        rather than projected; needs `num_items`.
      num_items: items in the catalogue; 0 where there are no own components.
      component_width: elements of each.
      gate_hidden: hidden width of the gating networks.
      normalise: gives components length 1, so that a logit is a cosine / temperature.
      temperature: divides the component logits.
      residual, scale: see `ResidualOverArch`.
    """

    width: int
    query_components: int = 4
    item_components: int = 4
    own_components: int = 0
    num_items: int = 0
    component_width: int = 32
    gate_hidden: int = 32
    normalise: bool = True
    temperature: float = 0.05
    residual: bool = True
    scale: float = 0.0

    def __post_init__(self):
        check_at_least(
            self, width=1, query_components=1, item_components=0, own_components=0,
            component_width=1, gate_hidden=1, num_items=0,
        )  # fmt: skip
        if self.item_components + self.own_components < 1:
            raise ValueError("MixtureOfLogitsConfig has no item_components and no own_components")
        if (self.own_components > 0) != (self.num_items > 0):
            raise ValueError(
                f"MixtureOfLogitsConfig: own_components={self.own_components} with "
                f"num_items={self.num_items}; give both or neither"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"MixtureOfLogitsConfig.temperature is {self.temperature}; expected above 0"
            )


class _Gate(nnx.Module):
    """Linear → SiLU → Linear, one output a component pair."""

    def __init__(self, fan_in: int, hidden: int, pairs: int, *, rngs: nnx.Rngs):
        self.up = Linear(fan_in, hidden, rngs=rngs, std=fan_in**-0.5)
        self.down = Linear(hidden, pairs, rngs=rngs, std=hidden**-0.5, bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.up(x)))


class MixtureOfLogits(ResidualOverArch):
    """Re-ranks by `jaxrec.ops.overarch.mixture_of_logits`; pointwise.

    Query and item are each projected to a few components; a gate that sees query, item and the
    components' dot products weighs these. Cached an item: X·W + P values (and D for the residual).
    """

    def __init__(self, config: MixtureOfLogitsConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        width, parts = config.width, config.component_width
        pairs = config.query_components * (config.item_components + config.own_components)
        hidden = config.gate_hidden
        spread = width**-0.5
        self.query_parts = Linear(width, config.query_components * parts, rngs=rngs, std=spread)
        self.item_parts = Linear(width, config.item_components * parts, rngs=rngs, std=spread)
        self.own_parts = nnx.data(None)
        if config.own_components:
            shape = (config.num_items + 1, config.own_components * parts)
            self.own_parts = nnx.Param(parts**-0.5 * jax.random.normal(rngs.params(), shape))
        self.query_gate = _Gate(width, hidden, pairs, rngs=rngs)
        self.item_gate = _Gate(width, hidden, pairs, rngs=rngs)
        self.cross_up = nnx.Param(pairs**-0.5 * jax.random.normal(rngs.params(), (pairs, hidden)))
        self.cross_bias = nnx.Param(jnp.zeros(hidden))
        self.cross_down = nnx.Param(
            hidden**-0.5 * jax.random.normal(rngs.params(), (hidden, pairs))
        )

    def _parts(self, flat: jax.Array) -> jax.Array:
        parts = flat.reshape(*flat.shape[:-1], -1, self.config.component_width)
        return l2_normalise(parts) if self.config.normalise else parts

    def _components(self, item_embeddings):
        flat = self.item_parts(item_embeddings)
        if self.own_parts is not None:
            own = self.own_parts[...]
            if own.shape[0] != flat.shape[0]:
                raise ValueError(
                    f"this mixture has own components of {own.shape[0] - 1} items; the item "
                    f"embeddings have {flat.shape[0]} rows (row 0 is padding)"
                )
            flat = jnp.concatenate([flat, own.astype(flat.dtype)], axis=-1)
        return {"parts": self._parts(flat), "gate": self.item_gate(item_embeddings)}

    def _score(self, query, components, valid):
        return mixture_of_logits(
            self._parts(self.query_parts(query)),
            self.query_gate(query),
            components["parts"],
            components["gate"],
            CrossGate(self.cross_up[...], self.cross_bias[...], self.cross_down[...]),
            temperature=self.config.temperature,
        )
