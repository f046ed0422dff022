"""How much memory a layer's training takes, from its sizes alone."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pallas_kernels.moe.activation import Activation, is_gated
from pallas_kernels.moe.api import Save, saved_bytes
from pallas_kernels.moe.config import Fetch, MoeConfig
from pallas_kernels.moe.groups import TILE_ROWS
from pallas_kernels.moe.parts import part_bytes

_ROUTING_BYTES = 32  # a pair: the routing structures, and what building them needs


class MoeMemory(NamedTuple):
    """Bytes of one `moe_ffn` with its gradient, as one program.

    Attributes:
      saved: between the passes, weights excepted: x, ids, gates and what the policy keeps. Exact.
      arguments: x, ids, gates, the gradient of y, and the weights. Exact.
      results: y, and the gradients of x, gates and weights. Exact.
      forward: temporaries of the forward pass, what it keeps included.
      backward: temporaries of the backward pass, what was kept included.
    """

    saved: int
    arguments: int
    results: int
    forward: int
    backward: int

    @property
    def temporaries(self) -> int:
        """The larger of both passes: the program's scratch memory."""
        return max(self.forward, self.backward)

    @property
    def peak(self) -> int:
        """Everything that the program needs at once; compiled programs are within 10 %."""
        return self.arguments + self.results + self.temporaries


@dataclass(frozen=True)
class MoeShape:
    """Sizes of a layer, and how it is trained; names as in `moe_ffn`.

    Attributes:
      num_tokens, width, hidden, num_experts, slots: T, D, H, E, K.
      itemsize: bytes of an element of x: 2 for bf16, 4 for f32.
      weight_itemsize: bytes of an element of the weights; None means those of x.
      biases: whether the experts have biases (in the dtype of the weights).
      backend: "mosaic_gpu", or "xla" as compiled for a CPU.
      fetch: the kernels' `MoeConfig.fetch`.
    """

    num_tokens: int
    width: int
    hidden: int
    num_experts: int
    slots: int
    activation: Activation = "swiglu"
    save: Save = "gate_up"
    chunk_tokens: int | None = None
    itemsize: int = 2
    weight_itemsize: int | None = None
    biases: bool = False
    backend: Literal["xla", "mosaic_gpu"] = "mosaic_gpu"
    fetch: Fetch = "gather"

    @property
    def num_weights(self) -> int:
        """Elements of all experts' weights and biases."""
        matrices = 2 if is_gated(self.activation) else 1
        inner = matrices * self.hidden
        biases = (inner + self.width) * self.biases
        return self.num_experts * (self.width * (inner + self.hidden) + biases)

    @property
    def num_chunks(self) -> int:
        """Parts that the tokens are taken in; the XLA backend has tiles instead."""
        if self.chunk_tokens is None or self.backend == "xla":
            return 1
        return -(-self.num_tokens // self.chunk_tokens)

    def most_tokens(self, num_bytes: int, *, layers: int = 1, optimizer_bytes: int = 0) -> int:
        """The most tokens, in whole tiles of 128, that training such layers fits; 0 if none do.

        Every layer has its weights, their gradients, the optimizer's state and what it saves; only
        one at a time has the rest.

        Args:
          num_bytes: of the device's memory.
          optimizer_bytes: state of a weight, such as 12 for an f32 copy and Adam's moments.
        """
        weight_bytes = 2 * (self.weight_itemsize or self.itemsize)
        states = (layers - 1) * weight_bytes + layers * optimizer_bytes

        def fits(tiles: int) -> bool:
            memory = moe_memory(replace(self, num_tokens=tiles * TILE_ROWS))
            others = states * self.num_weights + (layers - 1) * memory.saved
            return memory.peak + others <= num_bytes

        low, high = 0, 1
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * TILE_ROWS


def moe_memory(shape: MoeShape) -> MoeMemory:
    """Bytes that training one layer takes.

    The temporaries are a model of what the compiler does, held to compiled programs by tests.
    """
    tokens, width, pairs = shape.num_tokens, shape.width, shape.num_tokens * shape.slots
    saved = saved_bytes(
        tokens,
        width,
        shape.hidden,
        shape.slots,
        save=shape.save,
        activation=shape.activation,
        itemsize=shape.itemsize,
    )
    rows = tokens * width * shape.itemsize
    weights = shape.num_weights * (shape.weight_itemsize or shape.itemsize)
    kept = saved - rows - 8 * pairs
    passes = _kernel_passes if shape.backend == "mosaic_gpu" else _xla_passes
    forward, backward = passes(shape, kept)
    return MoeMemory(
        saved=saved,
        arguments=2 * rows + 8 * pairs + weights,
        results=2 * rows + 4 * pairs + weights,
        forward=forward,
        backward=backward,
    )


def _kernel_passes(shape: MoeShape, kept: int) -> tuple[int, int]:
    """Temporaries of the kernels, for padded rows of one chunk at a time."""
    matrices = 2 if is_gated(shape.activation) else 1
    itemsize, own = shape.itemsize, shape.weight_itemsize or shape.itemsize
    # What the kernels multiply: bf16 as it is, f32 in parts, made of values that a kernel wrote.
    operand = part_bytes(itemsize)
    splits = operand != itemsize
    chunk = min(shape.chunk_tokens or shape.num_tokens, shape.num_tokens)
    pairs = chunk * shape.slots
    rows = TILE_ROWS * (-(-pairs // TILE_ROWS) + shape.num_experts)
    inner, outer = rows * shape.hidden, rows * shape.width
    gate_up = matrices * pairs * shape.hidden * itemsize
    cast = shape.num_weights * operand * (splits or own != itemsize)
    common = cast + _ROUTING_BYTES * pairs

    # The activation, beside it gathered rows, then expert outputs. What is fetched saves traffic,
    # and memory only with fp8, where gate and up are encoded from what the kernel wrote.
    gathered = outer * operand * (shape.fetch == "gather")
    encoded = gate_up * (shape.save == "gate_up_fp8")
    forward = max(
        inner * itemsize + gathered + encoded,
        inner * operand + max(inner * itemsize * splits, outer * itemsize),
    )

    # Rows of x and dy, then of dx. Gradients of gate and up and the weighted activation are made
    # beside gate and up, which were kept, decoded or computed anew.
    taken, made = 2 * outer * operand, (matrices + 1) * inner
    backward = max(gate_up + made * itemsize, (made * operand + inner * itemsize) * splits)
    if shape.num_chunks > 1:
        # Gradients of weights are f32 sums of what the chunks give. Results in f32 are their place;
        # the place of others is free until the end, for rows and what is kept.
        new = 4 * matrices * shape.num_experts * shape.width * shape.hidden
        backward = max(backward, made * operand + new)
        room = own * shape.num_weights * (own != 4)
        if room:
            backward += 4 * shape.num_weights
        taken = max(0, taken - room)
        fits = kept <= room * matrices // (matrices + 1)  # matrix by matrix
        backward += kept * (not fits)
    return common + kept + forward, common + taken + backward


def _xla_passes(shape: MoeShape, kept: int) -> tuple[int, int]:
    """Temporaries of the XLA reference: one tile, f32 sums, and the zeros that they start from."""
    width, hidden, pairs = shape.width, shape.hidden, shape.num_tokens * shape.slots
    tile = MoeConfig.heuristic(pairs, shape.num_experts).tile_rows
    one_expert = 8 * shape.num_weights // shape.num_experts  # its weights and their gradients
    rows = 4 * shape.num_tokens * width
    common = one_expert + 4 * tile * (2 * width + 4 * hidden) + _ROUTING_BYTES * pairs
    common += max(kept, rows)
    if shape.itemsize == 4:
        return common, common
    return common + rows, common + rows + 4 * shape.num_weights
