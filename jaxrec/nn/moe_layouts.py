"""Weights of a `MoELayer` in the layouts of other libraries' checkpoints, there and back.

Letters: D width, H hidden width of an expert, S of the shared expert, E experts. Layouts:

| layout | names after the prefix | gate and up | matrices |
|---|---|---|---|
| "mixtral" | block_sparse_moe.experts.0.w1.weight (gate), w3 (up), w2 (down) | apart | [out, in] |
| "qwen_moe" | mlp.experts.0.gate_proj.weight, up_proj, down_proj | apart | [out, in] |
| "deepseek" | the same, mlp.shared_experts, mlp.gate.e_score_correction_bias | apart | [out, in] |
| "stacked" | mlp.experts.gate_up_proj [E, 2H, D], down_proj [E, D, H] | gate first | [out, in] |
| "gpt_oss" | mlp.experts.gate_up_proj [E, D, 2H], down_proj, biases | alternating | [in, out] |
| "megatron" | mlp.experts.linear_fc1.weight0 [2H, D], linear_fc2.weight0 | gate first | [out, in] |
| "megablocks" | experts.mlp.w1 (gate), v1 (up), w2 (down), all [E·H, D] | apart | grouped rows |

What they have in common is the order of numbers: every import and export is a permutation, so a
round trip gives the same bits. A layout says nothing about the mathematics: set the activation and
the router's scoring to what the weights were trained for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxrec.nn.moe import MoELayer

type Layout = Literal[
    "mixtral", "qwen_moe", "deepseek", "stacked", "gpt_oss", "megatron", "megablocks"
]


@dataclass(frozen=True)
class _Rule:
    """How some of a layer's weights become one tensor, or with `{}` in its name one an expert.

    Attributes:
      name: of the tensor, behind the prefix.
      parts: weights that it holds side by side along the last axis (as the layer has them).
      alternating: their columns take turns; otherwise the parts stand one behind the other.
      transposed: the last two axes change places.
      grouped: the first two axes are one.
    """

    name: str
    parts: tuple[str, ...]
    alternating: bool = False
    transposed: bool = False
    grouped: bool = False

    def names(self, num_experts: int) -> list[str]:
        return [self.name.format(e) for e in range(num_experts if "{}" in self.name else 1)]

    def pack(self, parts: list[np.ndarray]) -> np.ndarray:
        if self.alternating:
            whole = np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
        else:
            whole = np.concatenate(parts, axis=-1)
        if self.transposed:
            whole = whole.swapaxes(-1, -2)
        return whole.reshape(-1, whole.shape[-1]) if self.grouped else whole

    def unpack(self, whole: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        *_, rows, columns = (1, *shapes[0])
        if self.grouped:
            inner = columns if self.transposed else rows
            whole = whole.reshape(-1, inner, whole.shape[-1])
        if self.transposed:
            whole = whole.swapaxes(-1, -2)
        if self.alternating:
            count = len(shapes)
            return [whole[..., i::count] for i in range(count)]
        return np.split(whole, len(shapes), axis=-1)


def _apart(experts: str, gate: str, up: str, down: str) -> tuple[_Rule, ...]:
    names = ((gate, "w_gate"), (up, "w_up"), (down, "w_down"))
    return tuple(
        _Rule(f"{experts}.{{}}.{name}.weight", (part,), transposed=True) for name, part in names
    )


def _shared(module: str) -> tuple[_Rule, ...]:
    names = (
        ("gate_proj", "shared_gate"),
        ("up_proj", "shared_up"),
        ("down_proj", "shared_down"),
    )
    return tuple(_Rule(f"{module}.{name}.weight", (part,), transposed=True) for name, part in names)


def _router(name: str) -> _Rule:
    return _Rule(name, ("router",), transposed=True)


_GATE_UP, _SHARED_GATE_UP = ("w_gate", "w_up"), ("shared_gate", "shared_up")
_PROJECTIONS = _apart("mlp.experts", "gate_proj", "up_proj", "down_proj")
_LAYOUTS: dict[str, tuple[_Rule, ...]] = {
    "mixtral": (
        _router("block_sparse_moe.gate.weight"),
        *_apart("block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
    "qwen_moe": (_router("mlp.gate.weight"), *_PROJECTIONS, *_shared("mlp.shared_expert")),
    "deepseek": (
        _router("mlp.gate.weight"),
        _Rule("mlp.gate.e_score_correction_bias", ("expert_bias",)),
        *_PROJECTIONS,
        *_shared("mlp.shared_experts"),
    ),
    "stacked": (
        _router("mlp.gate.weight"),
        _Rule("mlp.experts.gate_up_proj", _GATE_UP, transposed=True),
        _Rule("mlp.experts.down_proj", ("w_down",), transposed=True),
        *_shared("mlp.shared_expert"),
    ),
    "gpt_oss": (
        _router("mlp.router.weight"),
        _Rule("mlp.experts.gate_up_proj", _GATE_UP, alternating=True),
        _Rule("mlp.experts.gate_up_proj_bias", ("b_gate", "b_up"), alternating=True),
        _Rule("mlp.experts.down_proj", ("w_down",)),
        _Rule("mlp.experts.down_proj_bias", ("b_down",)),
    ),
    "megatron": (
        _router("mlp.router.weight"),
        _Rule("mlp.router.expert_bias", ("expert_bias",)),
        _Rule("mlp.experts.linear_fc1.weight{}", _GATE_UP, transposed=True),
        _Rule("mlp.experts.linear_fc2.weight{}", ("w_down",), transposed=True),
        _Rule("mlp.experts.linear_fc1.bias{}", ("b_gate", "b_up")),
        _Rule("mlp.experts.linear_fc2.bias{}", ("b_down",)),
        _Rule("mlp.shared_experts.linear_fc1.weight", _SHARED_GATE_UP, transposed=True),
        _Rule("mlp.shared_experts.linear_fc2.weight", ("shared_down",), transposed=True),
    ),
    "megablocks": (
        _router("router.layer.weight"),
        _Rule("experts.mlp.w1", ("w_gate",), transposed=True, grouped=True),
        _Rule("experts.mlp.v1", ("w_up",), transposed=True, grouped=True),
        _Rule("experts.mlp.w2", ("w_down",), grouped=True),
    ),
}  # fmt: skip
_ROOTS = {"mixtral": ("block_sparse_moe.",), "megablocks": ("router.", "experts.")}
_FLOATS = ("float32", "bfloat16", "float16")


def export_moe(
    layer: MoELayer, layout: Layout, *, prefix: str = "", dtype: Any = None
) -> dict[str, np.ndarray]:
    """The layer's weights as tensors of that layout, by name; on the host.

    Args:
      layer: its experts may be split over devices of this process.
      prefix: put before every name, such as "model.layers.3.".
      dtype: of the tensors; None keeps the weights' f32. Weights that came from bf16 tensors are
        the same bits again as bf16.

    Raises:
      ValueError: the layout is unknown, or has no place for some of the layer's weights.
    """
    parts = _parts(layer)
    rules = _rules(layout, parts)
    values = {name: np.asarray(part.read()) for name, part in parts.items()}
    tensors: dict[str, np.ndarray] = {}
    for rule in rules:
        whole = rule.pack([values[name] for name in rule.parts])
        whole = whole if dtype is None else whole.astype(dtype)
        names = [prefix + name for name in rule.names(layer.config.num_experts)]
        pieces = whole if "{}" in rule.name else [whole]
        tensors |= {
            name: np.ascontiguousarray(piece) for name, piece in zip(names, pieces, strict=True)
        }
    return tensors


def import_moe(
    layer: MoELayer, tensors: Mapping[str, Any], layout: Layout, *, prefix: str = ""
) -> None:
    """Gives the layer the weights of a checkpoint; nothing changes unless all of them fit.

    Args:
      layer: keeps where its weights are, split experts too.
      tensors: by name; f32, bf16 or f16. What does not start with the prefix and the layout's
        module names belongs to other layers and is left alone.
      prefix: of this layer's names, such as "model.layers.3.".

    Raises:
      ValueError: the layout is unknown or has no place for some of the layer's weights; a tensor is
        missing, of another shape or dtype, or has no counterpart in the layer. The message names
        the tensor, what was expected and what was found.
    """
    parts = _parts(layer)
    rules = _rules(layout, parts)
    experts = layer.config.num_experts
    names = {rule: [prefix + name for name in rule.names(experts)] for rule in rules}
    known = {name for own in names.values() for name in own}
    roots = tuple(prefix + root for root in _ROOTS.get(layout, ("mlp.",)))
    if strange := sorted(name for name in tensors if name.startswith(roots) and name not in known):
        raise ValueError(
            f"the layer has no counterpart of {strange[0]} {list(np.shape(tensors[strange[0]]))}"
            f"{f' and {len(strange) - 1} more' if len(strange) > 1 else ''}; it has "
            f"{experts} experts and {', '.join(parts)}, in layout {layout!r}: {sorted(known)[0]} …"
        )
    new: dict[str, np.ndarray] = {}
    for rule in rules:
        shapes = [parts[name].shape for name in rule.parts]
        wanted = rule.pack(
            [np.broadcast_to(np.zeros((), np.int8), shape) for shape in shapes]
        ).shape
        wanted = wanted[1:] if "{}" in rule.name else wanted
        pieces = [_tensor(tensors, name, wanted) for name in names[rule]]
        whole = np.stack(pieces) if "{}" in rule.name else pieces[0]
        new |= dict(zip(rule.parts, rule.unpack(whole, shapes), strict=True))
    _write(layer, parts, new)


class _Part(NamedTuple):
    """A weight of the layer: a variable, or some of its columns."""

    variable: nnx.Variable
    columns: slice | None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.variable[...].shape
        return shape if self.columns is None else (shape[0], shape[1] // 2)

    def read(self) -> jax.Array:
        value = self.variable[...]
        return value if self.columns is None else value[:, self.columns]


def _parts(layer: MoELayer) -> dict[str, _Part]:
    """The layer's weights by name; those that it lacks are left out."""
    found: dict[str, Any] = {"router": layer.router.kernel}
    names = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")
    found |= {name: getattr(layer.experts, name) for name in names}
    found["expert_bias"] = layer.expert_bias
    found["router noise"] = None if layer.spread is None else layer.spread.kernel
    parts = {name: _Part(value, None) for name, value in found.items() if value is not None}
    if layer.shared_up is not None and layer.shared_down is not None:
        half = layer.shared_up.kernel[...].shape[1] // 2
        parts["shared_gate"] = _Part(layer.shared_up.kernel, slice(None, half))
        parts["shared_up"] = _Part(layer.shared_up.kernel, slice(half, None))
        parts["shared_down"] = _Part(layer.shared_down.kernel, None)
    return parts


def _rules(layout: str, parts: Mapping[str, _Part]) -> list[_Rule]:
    """The layout's rules for what the layer has."""
    if layout not in _LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(_LAYOUTS)}")
    if "w_gate" not in parts:
        raise ValueError(
            f"layout {layout!r} has a gate projection, and the layer's activation 'silu' none"
        )
    rules = [rule for rule in _LAYOUTS[layout] if all(name in parts for name in rule.parts)]
    placed = {name for rule in rules for name in rule.parts}
    if homeless := [name for name in parts if name not in placed]:
        raise ValueError(
            f"layout {layout!r} has no place for the layer's {', '.join(homeless)}; choose another "
            "layout, or a layer without"
        )
    return rules


def _tensor(tensors: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor in f32, if it is what is expected."""
    if name not in tensors:
        raise ValueError(f"{name} is missing; expected {list(shape)}, found {_near(tensors, name)}")
    value = np.asarray(tensors[name])
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {list(shape)}")
    if value.dtype.name not in _FLOATS:
        raise ValueError(f"{name} is {value.dtype}; expected one of {', '.join(_FLOATS)}")
    return value.astype(np.float32)


def _near(tensors: Mapping[str, Any], name: str) -> str:
    """What there is instead, for people: tensors of the same module."""
    module = name.rpartition(".")[0]
    while module:
        if near := sorted(other for other in tensors if other.startswith(module + ".")):
            return ", ".join(near[:3]) + (f" and {len(near) - 3} more" if len(near) > 3 else "")
        module = module.rpartition(".")[0]
    return f"{len(tensors)} tensors, none of this layer"


def _write(layer: MoELayer, parts: Mapping[str, _Part], new: dict[str, np.ndarray]) -> None:
    whole = {name: part for name, part in parts.items() if part.columns is None}
    values = [(part.variable, new[name]) for name, part in whole.items()]
    if layer.shared_up is not None:
        both = np.concatenate([new["shared_gate"], new["shared_up"]], axis=1)
        values.append((layer.shared_up.kernel, both))
    for variable, value in values:
        old = variable[...]
        variable[...] = jax.device_put(np.asarray(value, old.dtype), old.sharding)
