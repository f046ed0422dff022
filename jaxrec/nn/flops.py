"""Floating-point operations that a model's definition asks for, whatever computes them.

Counted are products: two operations a multiply-add. Norms, activations, gathers, and what a kernel
computes besides (padding, masked pairs, repeated work) are not.
"""

from typing import Any, NamedTuple

from jaxrec.nn.hstu import HSTUConfig
from jaxrec.nn.moe import MoEConfig
from jaxrec.nn.sasrec import SASRecConfig
from jaxrec.nn.towers import TwoStageConfig


class ForwardFlops(NamedTuple):
    """Of an encoder's forward pass; a gradient takes twice as many more.

    Attributes:
      token: for each token.
      pair: for each pair of tokens of which one attends to the other, or to itself.
    """

    token: float
    pair: float


def forward_flops(config: Any) -> ForwardFlops | None:
    """Those of an `HSTUConfig`, `SASRecConfig` or `TwoStageConfig` (its towers); else None."""
    if isinstance(config, TwoStageConfig):
        return forward_flops(config.towers)
    if isinstance(config, HSTUConfig):
        return _hstu(config)
    return _sasrec(config) if isinstance(config, SASRecConfig) else None


def _hstu(config: HSTUConfig) -> ForwardFlops:
    qk = config.num_heads * (config.qk_width or config.width // config.num_heads)
    v = config.num_heads * (config.v_width or config.width // config.num_heads)
    token = 2 * config.width * (2 * qk + 2 * v) + 2 * v * config.width
    if config.moe is not None:
        token += _experts(config.moe)
    return ForwardFlops(config.num_blocks * token, config.num_blocks * 2 * (qk + v))


def _sasrec(config: SASRecConfig) -> ForwardFlops:
    width = config.width
    token = 2 * width * 4 * width
    if config.moe is None:
        token += 4 * width * config.ffn_factor * width
    else:
        token += _experts(config.moe)
    if config.filter_share > 0:
        token += 2 * config.max_len * width
    return ForwardFlops(config.num_blocks * token, config.num_blocks * 4 * width)


def _experts(config: MoEConfig) -> int:
    matrices = 2 if config.activation == "silu" else 3
    experts = config.slots * matrices * config.hidden + 3 * config.shared_hidden
    return 2 * config.width * (config.num_experts + experts)
