"""How the kernels get rows and share them: from measurements where there are any."""

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels._backend import tuned_file
from pallas_kernels.moe.config import Fetch, MoeConfig
from pallas_kernels.moe.groups import TILE_ROWS

TUNED = Path(__file__).parent / "tuned"

_SIMILAR = 2.0  # how many times more or fewer pairs a measured layer may have
_FETCH_SLOTS = 104  # instructions of a fetching producer warp for a stage, its TMA copies included


@dataclass(frozen=True)
class Layer:
    """What the choice depends on: N pairs, E experts, D width, H hidden width, a gate or none."""

    num_pairs: int
    num_experts: int
    width: int
    hidden: int
    gated: bool = True


class Choice(NamedTuple):
    """What is measured; see `MoeConfig`."""

    fetch: Fetch = "gather"
    shared_tiles: int = MoeConfig.shared_tiles


class FetchCost(NamedTuple):
    """What fetching rows in the kernel saves and costs, against a gathered copy; by arithmetic.

    Attributes:
      rows_bytes: of the gathered copy, 2PD: the memory that is saved.
      saved_bytes: of traffic: the copy is written once and read once at least.
      issue_slots: instructions that the producer takes of each of a multiprocessor's schedulers.
      tensor_cycles: clock cycles of the projection's products on a multiprocessor, for comparison.
    """

    rows_bytes: int
    saved_bytes: int
    issue_slots: int
    tensor_cycles: int


def fetch_cost(layer: Layer, *, multiprocessors: int = 132) -> FetchCost:
    """The cost model of `MoeConfig.fetch`, for bf16 rows and even routing.

    The copy costs 2·2PD bytes of traffic before the products start. Fetching costs a scheduler
    instructions for every stage of 128 rows, 64 deep, of every tile of columns; they run beside
    the products, so they matter where they come near the cycles of those.
    """
    tiles = -(-layer.num_pairs // TILE_ROWS) + layer.num_experts
    columns = 128 if layer.gated or layer.hidden % 256 else 256
    stages = tiles * -(-layer.hidden // columns) * -(-layer.width // 64)
    rows_bytes = 2 * TILE_ROWS * tiles * layer.width
    # A stage has 64·columns multiply-adds a row, twice with a gate; 2048 of them take a cycle.
    products = stages * TILE_ROWS * 64 * columns * (2 if layer.gated else 1)
    return FetchCost(
        rows_bytes=rows_bytes,
        saved_bytes=2 * rows_bytes,
        issue_slots=stages * _FETCH_SLOTS // multiprocessors,
        tensor_cycles=products // 2048 // multiprocessors,
    )


def tuned_config(layer: Layer) -> MoeConfig:
    """The heuristic's sizes, and the choice that was measured best for such a layer, if any.

    A measured layer is such a one if it has the same widths, experts and gate, and at most twice or
    half as many pairs.
    """
    config = MoeConfig.heuristic(layer.num_pairs, layer.num_experts)
    near = [
        (max(pairs, layer.num_pairs) / min(pairs, layer.num_pairs), choice)
        for other, choice in _measured(tuned_path())
        if replace(layer, num_pairs=other.num_pairs) == other
        for pairs in [other.num_pairs]
    ]
    ratio, choice = min(near, default=(float("inf"), Choice()))
    return replace(config, **choice._asdict()) if ratio <= _SIMILAR else config


def tuned_path() -> Path:
    """Where the choices for this kind of device are recorded."""
    return tuned_file(TUNED, "moe_ffn.json")


def write_tuned(
    path: Path, choices: Sequence[tuple[Layer, Choice]], provenance: dict[str, Any]
) -> None:
    """Records measured choices, over those of the same layers that the file has."""
    known = dict(_measured(path)) | dict(choices)
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [asdict(layer) | choice._asdict() for layer, choice in known.items()]
    path.write_text(json.dumps({"provenance": provenance, "layers": layers}, indent=2) + "\n")
    _measured.cache_clear()


@functools.cache
def _measured(path: Path) -> tuple[tuple[Layer, Choice], ...]:
    if not path.exists():
        return ()
    rows = json.loads(path.read_text())["layers"]
    chosen = [Choice(**{name: row.pop(name) for name in Choice._fields}) for row in rows]
    return tuple((Layer(**row), choice) for row, choice in zip(rows, chosen, strict=True))
