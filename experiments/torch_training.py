"""SASRec and HSTU, and a step that trains them, in PyTorch: the models of `jaxrec.nn`, padded.

Weights are tensors by the name that they have there, so that both sides start from the same ones.
Sequences are rows of the longest's length, as PyTorch code of these models has them; attention is
dense, SASRec's by `scaled_dot_product_attention`. PyTorch is imported only when it is used.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxrec.functional import leaf_names
from jaxrec.nn import HSTUConfig, SASRecConfig
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.train import LossConfig, OptimizerConfig

EPS = 1e-6  # of every norm


def torch_device() -> Any:
    """The GPU if PyTorch sees one, else the CPU."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class PaddedBatch:
    """A batch as tensors.

    Attributes:
      ids: [B, L], 0 behind the end of each sequence.
      places: numbers of the real tokens among the B·L; [M].
      targets: the item behind each of them; [M].
    """

    ids: Any
    places: Any
    targets: Any

    @classmethod
    def of(cls, batch: JaggedBatch) -> "PaddedBatch":
        """A packed batch whose targets stand beside its tokens; unused sequences are left out."""
        import torch  # pyright: ignore[reportMissingImports]

        offsets = np.asarray(batch.seq_offsets)
        lengths = np.diff(offsets)
        lengths = lengths[lengths > 0]
        inside = np.arange(lengths.max()) < lengths[:, None]
        ids = np.zeros(inside.shape, np.int64)
        ids[inside] = np.asarray(batch.item_ids)[: offsets[-1]]
        targets = np.asarray(batch.target_ids)[: offsets[-1]].astype(np.int64)
        arrays = (ids, np.flatnonzero(inside), targets)
        return cls(*(torch.from_numpy(x).to(torch_device()) for x in arrays))


class TorchTraining:
    """Weights, their optimizer and average, and the step.

    Args:
      config: of the model: no attributes, experts, filter or time bias.
      params: of the model in jaxrec, copied.
      compiled: whether `torch.compile` makes the loss; it needs a C++ or CUDA compiler.
    """

    def __init__(
        self,
        config: HSTUConfig | SASRecConfig,
        params: Any,
        *,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        ema_decay: float | None = None,
        compiled: bool = False,
    ):
        import torch  # pyright: ignore[reportMissingImports]

        device = torch_device()
        arrays = zip(leaf_names(params), jax.tree.leaves(params), strict=True)
        self.weights = {
            name: torch.from_numpy(np.array(array)).to(device).requires_grad_()
            for name, array in arrays
        }
        self.config, self.loss_config, self.options = config, loss, optimizer
        self.optimizer = torch.optim.Adam(
            list(self.weights.values()),
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            fused=True,
        )
        self.ema_decay = ema_decay
        self.average = [w.detach().clone() for w in self.weights.values()] if ema_decay else []
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def step(self, batch: PaddedBatch) -> Any:
        """One update; returns its loss, still on the device."""
        import torch  # pyright: ignore[reportMissingImports]

        self.optimizer.zero_grad(set_to_none=True)
        weights = list(self.weights.values())
        loss = self.loss(batch.ids, batch.places, batch.targets)
        loss.backward()
        if self.options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, self.options.clip_norm)
        self.optimizer.step()
        if self.average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, weights, 1 - (self.ema_decay or 0))
        return loss.detach()

    def hidden(self, batch: PaddedBatch, *, dropout: float | None = None) -> Any:
        """States of the real tokens; [M, D] in float32."""
        rate = self.config.dropout if dropout is None else dropout
        encode: Any = hstu if isinstance(self.config, HSTUConfig) else sasrec
        states = encode(self.config, self.weights, batch.ids, rate)
        return states.flatten(0, 1)[batch.places]

    def _loss(self, ids: Any, places: Any, targets: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]
        from torch.nn import functional as f  # pyright: ignore[reportMissingImports]

        half = self.config.compute_dtype == "bfloat16"
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
            hidden = self.hidden(PaddedBatch(ids, places, targets))
            table = self.weights["items.table"]
            if self.loss_config.name == "full":
                return f.cross_entropy((hidden @ table[1:].T).float(), targets - 1)
            num, items = self.loss_config.num_negatives, table.shape[0] - 1
            drawn = torch.randint(1, items + 1, (num,), device=ids.device)
            own = (hidden * table[targets]).sum(1, keepdim=True).float()
            others = (hidden @ table[drawn].T).float() - math.log(num / items)
            others = others.masked_fill(drawn == targets[:, None], float("-inf"))
            return (torch.logsumexp(torch.cat([own, others], 1), 1) - own[:, 0]).mean()


def hstu(config: HSTUConfig, weights: Mapping[str, Any], ids: Any, rate: float) -> Any:
    """States [B, L, D] of an HSTU."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn import functional as f  # pyright: ignore[reportMissingImports]

    length, heads, width = ids.shape[1], config.num_heads, config.width
    qk = heads * (config.qk_width or width // heads)
    v_width = heads * (config.v_width or width // heads)
    distance = torch.arange(length, device=ids.device)
    distance = distance[:, None] - distance
    causal = distance >= 0
    x = f.embedding(ids, weights["items.table"]) * width**0.5
    x = f.dropout(x + weights["positions"][:length], rate)
    for n in range(config.num_blocks):
        own = {name: weights[f"blocks.{n}.{name}"] for name in _HSTU_BLOCK}
        normed = f.layer_norm(x, (width,), own["norm.scale"], own["norm.bias"], EPS)
        z = f.silu(normed @ own["uvqk.kernel"] + own["uvqk.bias"])
        u, v, q, k = z.split([v_width, v_width, qk, qk], dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2) + own["position_bias"][:, distance.clamp(min=0)]
        scores = torch.where(causal, f.silu(scores), 0).to(v.dtype)
        attended = (scores @ v / config.max_len).transpose(1, 2).flatten(2)
        gated = f.dropout(f.layer_norm(attended, (v_width,), eps=EPS) * u, rate)
        x = x + gated @ own["out.kernel"] + own["out.bias"]
    return f.layer_norm(x, (width,), weights["norm.scale"], weights["norm.bias"], EPS)


_HSTU_BLOCK = (
    "norm.scale", "norm.bias", "uvqk.kernel", "uvqk.bias", "position_bias", "out.kernel",
    "out.bias",
)  # fmt: skip


def sasrec(config: SASRecConfig, weights: Mapping[str, Any], ids: Any, rate: float) -> Any:
    """States [B, L, D] of a SASRec."""
    from torch.nn import functional as f  # pyright: ignore[reportMissingImports]

    length, width = ids.shape[1], config.width

    def norm(x, name):
        return f.layer_norm(x, (width,), weights[f"{name}.scale"], weights[f"{name}.bias"], EPS)

    def linear(x, name):
        return x @ weights[f"{name}.kernel"] + weights[f"{name}.bias"]

    x = f.embedding(ids, weights["items.table"], padding_idx=0) + weights["positions"][:length]
    x = f.dropout(norm(x, "norm"), rate)
    for n in range(config.num_blocks):
        block = f"blocks.{n}"
        qkv = linear(x, f"{block}.attention.qkv").unflatten(-1, (3, config.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = f.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = linear(attended.transpose(1, 2).flatten(2), f"{block}.attention.out")
        x = norm(x + f.dropout(attended, rate), f"{block}.attention_norm")
        hidden = f.gelu(linear(x, f"{block}.up"), approximate="tanh")
        x = norm(x + f.dropout(linear(hidden, f"{block}.down"), rate), f"{block}.ffn_norm")
    return x
