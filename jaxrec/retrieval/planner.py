"""How each query of a batch is searched: the cheapest way that reaches its recall."""

import enum
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from jaxrec.retrieval.ivf_index import IVFIndex, rank_lists
from pallas_kernels import IVF_TILE_ROWS, tuned_file

TUNED = Path(__file__).parent / "tuned"
SMALL_ROWS = 2_048
"""Up to so many rows, padding included, an index is searched by brute force whatever the filter.

Deciding takes longer: 0.9 ms for one filter over 1,024 items, and 0.4 ms to score them all; 39 and
27 ms for 256 filters (two cores). The program is also compiled in a quarter of the time.
"""
_TILE_WORDS = IVF_TILE_ROWS // 32
_WIDTH = 64  # the constants of a `CostModel` are for rows of so many values


class Strategy(enum.IntEnum):
    """Ways to search, as numbers of `SearchPlan.strategy`."""

    COMPACT = 0
    """Gathers the eligible rows and scores these alone; exact."""
    PROBE = 1
    """Scans the lists nearest to the query until they hold enough eligible rows."""
    SCAN = 2
    """Scans all rows for the whole batch at once."""


class SearchPlan(NamedTuple):
    """What is done for each query.

    Attributes:
      strategy: numbers of `Strategy`; i32[Q].
      eligible: rows that possibly pass the query's filter; i32[Q].
      probes: lists that PROBE scans; i32[Q].
    """

    strategy: Int32[Array, "Q"]
    eligible: Int32[Array, "Q"]
    probes: Int32[Array, "Q"]


@dataclass(frozen=True)
class CostModel:
    """Nanoseconds of the parts of a search, rows being 64 wide; wider ones cost in proportion.

    The defaults were measured on two cores of an x86 server; `experiments.calibrate_planner`
    measures a machine's own.

    Attributes:
      mask_word: counting and adding up a word of the mask.
      eligible_row: finding and gathering an eligible row.
      eligible_score: scoring a gathered row for one of the queries that share the mask.
      probed_row: a row of a probed list.
      scanned_row: reading a row for the whole batch.
      scanned_score: scoring it for one query.
    """

    mask_word: float = 4.0
    eligible_row: float = 120.0
    eligible_score: float = 3.0
    probed_row: float = 14.0
    scanned_row: float = 20.0
    scanned_score: float = 1.5

    def compact(self, words: int, eligible, heads: int, width: int):
        """One mask of `words` words with so many eligible rows, for `heads` queries."""
        row = (self.eligible_row + self.eligible_score * heads) * width / _WIDTH
        return self.mask_word * words + row * eligible

    def probe(self, rows, width: int):
        """One query that scans so many rows of its lists."""
        return self.probed_row * width / _WIDTH * rows

    def scan(self, rows: int, queries: int, width: int) -> float:
        """All rows, for a whole batch of queries."""
        return (self.scanned_row + self.scanned_score * queries) * width / _WIDTH * rows


@functools.cache
def tuned_costs() -> CostModel:
    """The constants recorded for this kind of device, else the defaults."""
    path = tuned_path()
    return CostModel(**json.loads(path.read_text())["costs"]) if path.exists() else CostModel()


def tuned_path() -> Path:
    """Where the constants of this kind of device are recorded."""
    return tuned_file(TUNED, "ivf_planner.json")


def make_plan(
    ivf: IVFIndex,
    eligible: Int32[Array, "M"],
    *,
    heads: int,
    k: int,
    nprobe: int | None,
    shares: tuple[tuple[float, float], ...],
    all_rows: bool | Bool[Array, ""],
    costs: CostModel,
) -> tuple[Int32[Array, "M"], Float32[Array, "M"]]:
    """(strategy, share of the eligible rows that PROBE has to scan) of each filter; traceable.

    Each filter takes the cheaper of COMPACT and PROBE, unless one SCAN for all is cheaper than
    these together. With `all_rows`, or where all lists are needed, there is no PROBE. A small index
    is always scanned.
    """
    num_rows, width = ivf.codes.shape
    if is_small(ivf):
        return jnp.full(len(eligible), Strategy.SCAN, jnp.int32), jnp.ones(len(eligible))
    compact = costs.compact(num_rows // 32, eligible, heads, width)
    scan = costs.scan(num_rows, len(eligible) * heads, width)
    if nprobe is None:
        share = needed_share(shares, k / jnp.maximum(eligible, 1))
    else:
        share = jnp.full(len(eligible), nprobe / ivf.nlist)
    probe = costs.probe(share * num_rows, width) * heads
    probe = jnp.where((share >= 1) | all_rows, jnp.inf, probe)
    each = jnp.where(compact <= probe, Strategy.COMPACT, Strategy.PROBE)
    together = jnp.sum(jnp.minimum(compact, probe)) > scan
    return jnp.where(together, Strategy.SCAN, each).astype(jnp.int32), share


def is_small(ivf: IVFIndex) -> bool:
    """Whether there is nothing to decide; see `SMALL_ROWS`."""
    return ivf.codes.shape[0] <= SMALL_ROWS


def needed_share(shares: tuple[tuple[float, float], ...], wanted) -> Float32[Array, "*shape"]:
    """The share of rows to scan for the best `wanted` part of them; `shares` as of `tuning.tune`.

    Linear in the logarithm of `wanted` between the measured points.
    """
    points = np.asarray(shares, np.float32)
    return jnp.interp(jnp.log(wanted), jnp.log(points[:, 0]), points[:, 1]).astype(jnp.float32)


def probe_counts(
    ivf: IVFIndex,
    queries: Float[Array, "Q D"],
    list_eligible: Int32[Array, "Q C"],
    share: Float32[Array, "Q"],
) -> Int32[Array, "Q"]:
    """Lists, nearest first, that together hold this share of a query's eligible rows."""
    order = rank_lists(ivf, queries)
    held = jnp.cumsum(jnp.take_along_axis(list_eligible, order, axis=1), axis=1)
    wanted = share[:, None] * held[:, -1:].astype(jnp.float32)
    probes = 1 + jnp.sum(held < wanted, axis=1, dtype=jnp.int32)
    return jnp.minimum(probes, ivf.nlist)


def eligible_by_list(ivf: IVFIndex, mask: UInt32[Array, "M words"]) -> Int32[Array, "M C"]:
    """Set bits of each mask in the rows of each list."""
    in_words = lax.population_count(mask).astype(jnp.int32)
    before = jnp.pad(jnp.cumsum(in_words, axis=1), ((0, 0), (1, 0)))
    return jnp.diff(before[:, jnp.asarray(ivf.tile_offsets) * _TILE_WORDS], axis=1)
