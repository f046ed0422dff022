"""Peers in PyTorch and Triton of the Bloom and IVF searches, over the same index.

A peer is a function of no arguments that returns tensors. PyTorch is imported only when a peer is
made, so that the benchmarks run without it. All give the reference's answers on a CPU too, the
Triton ones with TRITON_INTERPRET=1.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import probed_tiles_bound
from pallas_kernels._timing import Timing
from pallas_kernels.bloom import BloomOp
from pallas_kernels.bloom.workloads import BloomWorkload
from pallas_kernels.ivf import TILE_ROWS, quantise
from pallas_kernels.ivf.workloads import IvfWorkload

SEED = 0
_BLOOM_BLOCK = 128  # words of a Triton program over tiles


def run_peers(
    makers: Mapping[str, Callable[[], Callable[[], Any]]],
    check: Callable[[Any], Mapping[str, Any]],
    *,
    repeats: int,
) -> tuple[dict[str, Timing], dict[str, Mapping[str, Any]]]:
    """Timings of the peers, and what `check` finds in their results or why there are none.

    A peer that is missing or fails must not cost the run.
    """
    timings, checks = {}, {}
    for name, make in makers.items():
        try:
            call = make()
            checks[name] = check(call())
            timings[name] = _time(call, repeats)
        except Exception as error:
            print(f"skipped {name}: {type(error).__name__}: {error}")
            checks[name] = {"error": str(error)}
    return timings, checks


def _time(call: Callable[[], Any], repeats: int) -> Timing:
    """Device time of each call, the L2 cache emptied before it."""
    import torch  # pyright: ignore[reportMissingImports]

    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    samples = []
    for _ in range(2 + repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1e3)
    return Timing(tuple(samples[2:]))


def _tensor(array: Any) -> Any:
    """The array as a tensor on its device; unsigned words as signed ones."""
    import torch  # pyright: ignore[reportMissingImports]

    array = jnp.asarray(array)
    if array.dtype == jnp.uint32:
        array = jax.lax.bitcast_convert_type(array, jnp.int32)
    return torch.from_dlpack(jax.block_until_ready(array))


def _triton_kernels() -> Any:
    """The module of the kernels; Triton is imported only here."""
    return importlib.import_module("experiments.triton_kernels")


def plain_masks(workload: BloomWorkload, arrays: list[jax.Array]) -> jax.Array:
    """One mask, u32[Q, words], with NOT as a plain complement: false positives bar items."""
    rows, offsets, opcodes, operands = arrays
    barring = 5  # the step of the term behind NOT
    program = jnp.full_like(opcodes, BloomOp.END).at[:, 0].set(BloomOp.TAIL)
    barred = workload.run(
        rows, offsets, program, operands.at[:, 0].set(operands[:, barring]), backend="xla"
    )
    return workload.run(*arrays, backend="xla").possibly & ~barred.possibly


class BloomPeer:
    """A Bloom index in PyTorch, with one mask: NOT complements false positives with the rest."""

    def __init__(self, workload: BloomWorkload, arrays: Any):
        """Arrays: rows, row_offsets, opcodes, operands."""
        rows, offsets, _, operands = arrays
        self.workload = workload
        self.rows, self.offsets = _tensor(rows), _tensor(offsets).long()
        self.operands = (_tensor(operands).long() & 0xFFFFFFFF).contiguous()

    def torch(self) -> Callable[[], Any]:
        """One query after the other, an operation a row: i32[Q, words]."""
        import torch  # pyright: ignore[reportMissingImports]

        hashes, head = self.workload.num_hashes, self.workload.num_head
        starts = self.offsets[:-1]
        widths = (self.offsets[1:] - starts - head) // hashes

        def tail(operands: Any) -> Any:
            mask = None
            for k in range(hashes):
                row = self.rows[starts + head + k * widths + operands[k] % widths]
                mask = row if mask is None else mask & row
            return mask

        def search() -> Any:
            found = []
            for own in self.operands:
                mask = self.rows[starts + own[0, 0]] | tail(own[1])
                found.append((mask & tail(own[3]) & ~tail(own[5])).reshape(-1))
            return torch.stack(found)

        return search

    def triton(self) -> Callable[[], Any]:
        """A program a bundle and query: i32[Q, words]."""
        kernels = _triton_kernels()
        bundles, words = len(self.offsets) - 1, self.rows.shape[1]
        queries, steps, hashes = self.operands.shape
        out = self.rows.new_empty(queries, bundles * words)

        def search() -> Any:
            kernels.bloom_all[(bundles, queries)](
                self.rows, self.offsets, self.operands, out,
                self.workload.num_head, bundles * words,
                WORDS=words, STEPS=steps, HASHES=hashes,
            )  # fmt: skip
            return out

        return search

    def triton_tiles(self, max_tiles: int) -> Callable[[Any], Any]:
        """From tiles i32[Q, max_tiles] their masks i32[Q, 2·max_tiles]."""
        kernels = _triton_kernels()
        queries, steps, hashes = self.operands.shape
        out = self.rows.new_empty(queries, 2 * max_tiles)
        blocks = -(-2 * max_tiles // _BLOOM_BLOCK)

        def search(tiles: Any) -> Any:
            kernels.bloom_tiles[(blocks, queries)](
                self.rows, self.offsets, self.operands, tiles, out,
                self.workload.num_head, max_tiles,
                WORDS=self.rows.shape[1], STEPS=steps, HASHES=hashes, BLOCK=_BLOOM_BLOCK,
            )  # fmt: skip
            return out

        return search


class IvfPeer:
    """An inverted file in PyTorch."""

    def __init__(self, workload: IvfWorkload, arrays: Mapping[str, Any]):
        """Arrays: as `IvfWorkload.arrays` names them."""
        self.k, self.nprobe = workload.k, workload.nprobe
        self.max_tiles = probed_tiles_bound(workload.tile_offsets(SEED), workload.nprobe)
        query_codes, _ = quantise(arrays["queries"])
        words = jnp.asarray(arrays["mask"]) & jnp.asarray(arrays["live"])
        named = dict(arrays) | {"query_codes": query_codes, "words": words}
        kept = ("queries", "centroids", "codes", "scales", "tile_offsets", "query_codes", "words")
        self.tensors = {name: _tensor(named[name]) for name in kept}

    def tiles(self) -> Any:
        """The tiles that each query scans, i32[Q, max_tiles]; -1 behind the last."""
        import torch  # pyright: ignore[reportMissingImports]

        t = self.tensors
        lists = (t["queries"] @ t["centroids"].T).topk(self.nprobe, dim=1).indices
        starts = t["tile_offsets"][lists]
        sizes = t["tile_offsets"][lists + 1] - starts
        ends = sizes.cumsum(1)
        slot = torch.arange(self.max_tiles, device=ends.device)
        slots = slot.expand(len(ends), -1).contiguous()
        which = torch.searchsorted(ends, slots, right=True).clamp_max(self.nprobe - 1)
        tiles = (starts - (ends - sizes)).gather(1, which) + slot
        return torch.where(slot < ends[:, -1:], tiles, -1).to(torch.int32)

    def torch(self) -> Callable[[], Any]:
        """Gathers the probed rows of one query after the other; products in float32."""
        import torch  # pyright: ignore[reportMissingImports]

        t = self.tensors
        lane = torch.arange(TILE_ROWS, device=t["codes"].device)
        bit = torch.arange(32, device=lane.device, dtype=torch.int32)

        def search() -> Any:
            found = []
            for query, tiles in enumerate(self.tiles()):
                rows = (tiles.clamp_min(0)[:, None] * TILE_ROWS + lane).reshape(-1)
                scores = t["codes"][rows].float() @ t["query_codes"][query].float()
                words = t["words"][query].reshape(-1, 2)[tiles.clamp_min(0)]
                passes = ((words[..., None] >> bit) & 1).bool().reshape(-1)
                passes &= (tiles >= 0).repeat_interleave(TILE_ROWS)
                scores = (scores * t["scales"][rows]).masked_fill(~passes, float("-inf"))
                best, places = scores.topk(min(self.k, len(scores)))
                found.append((best, rows[places]))
            return tuple(torch.stack(part) for part in zip(*found, strict=True))

        return search

    def triton(self, masks: Callable[[Any], Any] | None = None) -> Callable[[], Any]:
        """A Triton program a query and tile writes its scores; `torch.topk` reads them all.

        Args:
          masks: from the tiles of each query their words, in order; None takes the index's masks.
        """
        kernels = _triton_kernels()
        t = self.tensors
        num_queries, width = t["query_codes"].shape
        scores = t["scales"].new_empty(num_queries, self.max_tiles * TILE_ROWS)

        def search() -> Any:
            tiles = self.tiles()
            words = t["words"] if masks is None else masks(tiles)
            kernels.ivf_scan[(self.max_tiles, num_queries)](
                t["codes"], t["scales"], t["query_codes"], words, tiles, scores,
                self.max_tiles, words.shape[1],
                WIDTH=width, ROWS=TILE_ROWS, BY_SLOT=masks is not None,
            )  # fmt: skip
            best, places = scores.topk(min(self.k, scores.shape[1]), dim=1)
            tile = tiles.gather(1, places // TILE_ROWS)
            return best, tile * TILE_ROWS + places % TILE_ROWS

        return search


def recall(rows: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the wanted rows, [Q, K] with -1 for none, that were found."""
    hits = [np.isin(want[want >= 0], row) for row, want in zip(rows, wanted, strict=True)]
    return float(np.mean(np.concatenate(hits))) if sum(map(len, hits)) else 1.0
