"""A mixture-of-experts feed-forward layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxrec.nn.checks import check_at_least, check_choice
from jaxrec.nn.layers import Linear
from jaxrec.ops import routing as ops
from jaxrec.ops.expert_parallel import Exchanged, ExpertParallel, split_ffn, split_route
from jaxrec.ops.jagged import JaggedBatch, segment_ids, valid_tokens
from jaxrec.ops.routing import RouterStats, Routing
from pallas_kernels import MoeMemory, MoeShape, moe_ffn, moe_memory


@dataclass(frozen=True)
class MoEConfig:
    """Shape of a `MoELayer`, and how its router is kept balanced.

    Attributes:
      width: of tokens, in and out.
      num_experts, hidden, slots: E experts of this hidden width, of which each token uses `slots`.
      shared_hidden: hidden width of an expert that every token uses besides; 0 for none.
      activation, save, chunk_tokens: see `pallas_kernels.moe_ffn`.
      bias: gives projections biases.
      scoring, normalise, groups, top_groups: see `jaxrec.ops.routing.route`.
      noise: learns how much noise the router adds to its logits in training.
      capacity_factor: drops pairs over factor · T · slots / E of an expert; None drops none.
      balance_weight, sequence_weight, cv_weight, z_weight: of the losses `load_balancing_loss`,
        `sequence_balancing_loss`, `cv_squared` of importance, and `router_z_loss`.
      bias_rate: step of `updated_bias`; 0 leaves the choice to the scores alone.
    """

    width: int
    num_experts: int
    hidden: int
    slots: int = 2
    shared_hidden: int = 0
    activation: Literal["swiglu", "geglu", "silu"] = "swiglu"
    save: Literal["gate_up", "gate_up_fp8", "x"] = "gate_up"
    chunk_tokens: int | None = None
    bias: bool = False
    scoring: ops.Scoring = "softmax"
    normalise: ops.Normalise = "selected"
    groups: int = 1
    top_groups: int = 1
    noise: bool = False
    capacity_factor: float | None = None
    balance_weight: float = 0.01
    sequence_weight: float = 0.0
    cv_weight: float = 0.0
    z_weight: float = 0.001
    bias_rate: float = 0.0

    def __post_init__(self):
        check_at_least(self, width=1, num_experts=1, hidden=1, slots=1, shared_hidden=0)
        check_choice(self, "activation", ("swiglu", "geglu", "silu"))
        check_choice(self, "save", ("gate_up", "gate_up_fp8", "x"))
        for name in ("balance_weight", "sequence_weight", "cv_weight", "z_weight", "bias_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"MoEConfig.{name} is {getattr(self, name)}; expected 0 or more")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(
                f"MoEConfig.capacity_factor is {self.capacity_factor}; expected above 0, or None"
            )
        # Tried out on no tokens, so that every mistake surfaces here and not in training.
        logits = jax.ShapeDtypeStruct((0, self.num_experts), jnp.float32)
        jax.eval_shape(lambda x: ops.route(x, **self.routing), logits)

    @property
    def routing(self) -> dict:
        """Arguments of `route`."""
        names = ("slots", "scoring", "normalise", "groups", "top_groups")
        return {name: getattr(self, name) for name in names}

    def memory(
        self,
        num_tokens: int,
        *,
        itemsize: int = 4,
        backend: Literal["xla", "mosaic_gpu"] = "mosaic_gpu",
    ) -> MoeMemory:
        """Bytes that training the experts on so many tokens takes; see `MoeMemory`.

        Router and shared expert are left out.

        Args:
          itemsize: bytes of an element of the tokens: 4 for f32, 2 for bf16; weights are f32.
          backend: of `moe_ffn`.
        """
        shape = MoeShape(
            num_tokens,
            self.width,
            self.hidden,
            self.num_experts,
            self.slots,
            activation=self.activation,
            save=self.save,
            chunk_tokens=self.chunk_tokens,
            itemsize=itemsize,
            weight_itemsize=4,
            biases=self.bias,
            backend=backend,
        )
        return moe_memory(shape)


class ExpertBias(nnx.Variable):
    """The router's bias for its choice: state that `updated_bias` moves, not an optimizer."""


class MoEReport(NamedTuple):
    """What a layer's call tells besides its output.

    Attributes:
      loss: weighted sum of the balancing losses, to be added to the training loss; f32.
      stats: see `RouterStats`.
    """

    loss: Float32[Array, ""]
    stats: RouterStats


class Experts(nnx.Module):
    """Weights of E gated feed-forward networks; f32.

    `parallel` tells over which devices they are split; None for no such split.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.parallel: ExpertParallel | None = None
        experts, width, hidden = config.num_experts, config.width, config.hidden
        gated = config.activation != "silu"

        def matrix(fan_in, fan_out):
            shape = (experts, fan_in, fan_out)
            return nnx.Param(fan_in**-0.5 * jax.random.normal(rngs.params(), shape))

        def zeros(size, wanted):
            return nnx.Param(jnp.zeros((experts, size))) if wanted else nnx.data(None)

        self.w_gate = matrix(width, hidden) if gated else nnx.data(None)
        self.w_up, self.w_down = matrix(width, hidden), matrix(hidden, width)
        self.b_gate = zeros(hidden, config.bias and gated)
        self.b_up, self.b_down = zeros(hidden, config.bias), zeros(width, config.bias)

    def route(
        self,
        logits: Float[Array, "T E"],
        *,
        bias: Float[Array, "E"] | None,
        valid: Bool[Array, "T"] | None,
    ) -> Routing:
        """See `jaxrec.ops.routing.route`, and `split_route` where the experts are split."""
        options: dict[str, Any] = {"bias": bias, "valid": valid, **self.config.routing}
        if self.parallel is None:
            return ops.route(logits, **options)
        return split_route(logits, self.parallel, **options)

    def __call__(
        self,
        x: Float[Array, "T D"],
        expert_ids: Int[Array, "T K"],
        gates: Float[Array, "T K"],
        beside: Float[Array, "T S"] | None = None,
    ) -> Exchanged:
        """See `pallas_kernels.moe_ffn`, and `split_ffn` where the experts are split."""
        config = self.config
        names = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")
        weights = {
            name: None if (value := getattr(self, name)) is None else value[...] for name in names
        }
        options = {
            "activation": config.activation, "save": config.save,
            "chunk_tokens": config.chunk_tokens,
        }  # fmt: skip
        if self.parallel is None:
            arguments: Any = weights | options
            out = moe_ffn(x, expert_ids, gates, **arguments)
            return Exchanged(out, jnp.zeros((), jnp.int32), beside)
        return split_ffn(x, expert_ids, gates, weights, self.parallel, beside=beside, **options)


class MoELayer(nnx.Module):
    """A router and its experts in place of a feed-forward network. No token is dropped by default.

    The router works in f32, the experts in the dtype of x. `jaxrec.distributed.split_experts`
    splits the experts over devices; the call, its output and its report stay what they are.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, experts = config.width, config.num_experts
        self.router = Linear(width, experts, rngs=rngs, bias=False, std=width**-0.5)
        self.spread = (
            Linear(width, experts, rngs=rngs, bias=False, std=0.0) if config.noise else None
        )
        self.experts = Experts(config, rngs=rngs)
        self.expert_bias = ExpertBias(jnp.zeros(experts)) if config.bias_rate else nnx.data(None)
        shared = config.shared_hidden
        self.shared_up = (
            Linear(width, 2 * shared, rngs=rngs, bias=False, std=width**-0.5) if shared else None
        )
        self.shared_down = (
            Linear(shared, width, rngs=rngs, bias=False, std=shared**-0.5) if shared else None
        )

    def __call__(
        self,
        x: Float[Array, "T D"],
        *,
        valid: Bool[Array, "T"] | None = None,
        segment_ids: Int[Array, "T"] | None = None,
        num_sequences: int = 0,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "T D"], MoEReport]:
        """(output, report) for every token; zeros for padding.

        Args:
          valid: False for padding, which goes to no expert.
          segment_ids, num_sequences: see `sequence_balancing_loss`, which needs them.
          key: draws the router's noise; None (serving) adds none.

        Raises:
          ValueError: sequence_weight is set and segment_ids are missing.
        """
        config = self.config
        logits = self._logits(x, key)
        bias = None if self.expert_bias is None else self.expert_bias[...]
        routing = self.experts.route(logits, bias=bias, valid=valid)
        loss = self._loss(logits, routing, valid, segment_ids, num_sequences)
        ids, gates, dropped = routing.expert_ids, routing.gates, 0
        if config.capacity_factor is not None:
            share = config.capacity_factor * x.shape[0] * config.slots / config.num_experts
            ids, gates, dropped = ops.within_capacity(
                ids, gates, num_experts=config.num_experts, capacity=max(1, round(share))
            )
        out, lost, shared = self.experts(x, ids, gates, beside=self._shared_hidden(x))
        out = self._add_shared(out, shared, valid)
        return out, MoEReport(loss, ops.router_stats(routing, dropped + lost, logits=logits))

    def on_sequences(
        self,
        x: Float[Array, "T D"],
        seq_offsets: Int[Array, "B1"],
        *,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "T D"], MoEReport]:
        """The call for packed sequences: slots behind the last one are padding."""
        tokens = x.shape[0]
        return self(
            x,
            valid=valid_tokens(seq_offsets, tokens),
            segment_ids=segment_ids(seq_offsets, tokens),
            num_sequences=seq_offsets.shape[0] - 1,
            key=key,
        )

    def update_bias(self, load: Int[Array, "E"]) -> None:
        """Moves the router's bias against this load (of one step, or summed over devices)."""
        if self.expert_bias is not None:
            moved = ops.updated_bias(self.expert_bias[...], load, rate=self.config.bias_rate)
            self.expert_bias[...] = moved

    def _logits(self, x: Array, key: jax.Array | None) -> Array:
        x32 = x.astype(jnp.float32)
        logits = self.router(x32)
        if self.spread is None or key is None:
            return logits
        return ops.noisy(logits, self.spread(x32), key)

    def _shared_hidden(self, x: Array) -> Array | None:
        if self.shared_up is None:
            return None
        gate, up = jnp.split(self.shared_up(x), 2, axis=-1)
        return jax.nn.silu(gate) * up

    def _add_shared(self, out: Array, hidden: Array | None, valid: Array | None) -> Array:
        if hidden is None or self.shared_down is None:
            return out
        shared = self.shared_down(hidden)
        return out + (shared if valid is None else jnp.where(valid[:, None], shared, 0))

    def _loss(self, logits, routing, valid, segment_ids, num_sequences) -> Array:
        config = self.config
        loss = jnp.zeros((), jnp.float32)
        if config.balance_weight:
            loss += config.balance_weight * ops.load_balancing_loss(routing)
        if config.cv_weight:
            loss += config.cv_weight * ops.cv_squared(ops.importance(routing))
        if config.z_weight:
            loss += config.z_weight * ops.router_z_loss(logits, valid)
        if config.sequence_weight:
            if segment_ids is None:
                raise ValueError("sequence_weight is set: pass segment_ids and num_sequences")
            per_sequence = ops.sequence_balancing_loss(routing, segment_ids, num_sequences)
            loss += config.sequence_weight * per_sequence
        return loss


def check_routers(reports: Mapping[str, MoEReport]) -> None:
    """Raises if a router's logits are not finite, and names the layer. Host only; waits for them.

    Inside of jit nothing can raise, so a layer only counts such tokens; whoever reads the reports
    of a step checks them:

        check_routers({"blocks.0.moe": first, "blocks.1.moe": second})

    Args:
      reports: by the name of the layer, in the order in which the model calls them.

    Raises:
      FloatingPointError: for the first layer with such logits, as those behind it follow from it.
    """
    for name, report in reports.items():
        if broken := int(report.stats.nonfinite):
            raise FloatingPointError(
                f"{name}: the router's logits are not finite for {broken} of its tokens. Its input "
                "or its weights hold NaN or infinity: check the learning rate, the gradients' norm "
                "and the batch, and resume from a checkpoint before this step"
            )


def check_experts(config: Any) -> None:
    """Raises ValueError unless `config.moe` is None or a `MoEConfig` of the model's width."""
    name, moe = type(config).__name__, config.moe
    if isinstance(moe, Mapping):
        raise ValueError(f"{name}.moe is a mapping; read stored fields with {name}.from_dict")
    if moe is not None and moe.width != config.width:
        raise ValueError(
            f"{name}: moe.width is {moe.width}, the model's {config.width}; expected the same"
        )


def config_from_dict[C](kind: type[C], fields: Mapping[str, Any]) -> C:
    """The configuration of a model that `dataclasses.asdict` made `fields` of."""
    moe = fields.get("moe")
    return kind(**{**fields, "moe": None if moe is None else MoEConfig(**moe)})


def encode_with_reports(
    model: Any, batch: JaggedBatch, *, key: jax.Array | None = None
) -> tuple[Float[Array, "T D"], tuple[MoEReport, ...]]:
    """`model.encode`, and what its `moe_layers` report; nothing where a model has none."""
    if hasattr(model, "encode_with_reports"):
        return model.encode_with_reports(batch, key=key)
    return model.encode(batch, key=key), ()


def update_expert_bias(model: Any, reports: tuple[MoEReport, ...]) -> None:
    """Moves the bias of each of the model's routers against the load that it reported."""
    layers = model.moe_layers() if reports else []
    for layer, report in zip(layers, reports, strict=True):
        layer.update_bias(report.stats.load)
