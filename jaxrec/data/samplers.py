"""Negative samplers as plain arrays: usable in jit, with the log-probability of every item."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int32, Int64, Key

from jaxrec.data.dataset import SequenceDataset


def item_counts(dataset: SequenceDataset) -> Int64[np.ndarray, "V"]:
    """How often each item occurs; entry 0 (padding) is 0; i64[num_items + 1]."""
    return np.bincount(dataset.item_ids, minlength=dataset.num_items + 1).astype(np.int64)


class UniformSampler(NamedTuple):
    """Draws every item with the same probability, padding never.

    Attributes:
      num_items: items are 1..num_items.
      log_q: log of each item's probability; 0 for padding, which is never drawn; f32[V].
    """

    num_items: int | Int[Array, ""]
    log_q: Float[np.ndarray | Array, "V"]

    @classmethod
    def create(cls, num_items: int) -> "UniformSampler":
        """A sampler over items 1..num_items."""
        _check_num_items(num_items)
        return cls(num_items, _log_q(np.full(num_items, 1 / num_items)))

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "..."]:
        """Independent item numbers, with replacement; i32[shape]."""
        return jax.random.randint(key, shape, 1, self.num_items + 1, dtype=jnp.int32)


class PopularitySampler(NamedTuple):
    """Draws items by popularity, by the alias method: O(1) a draw, exact for any vocabulary.

    Bin i (item i + 1) keeps its own item with probability `threshold[i]` and gives `alias[i]`
    otherwise.

    Attributes:
      threshold: f32[V - 1].
      alias: item numbers; i32[V - 1].
      log_q: log of each item's probability; 0 for padding, which is never drawn; f32[V].
    """

    threshold: Float[np.ndarray | Array, "V-1"]
    alias: Int[np.ndarray | Array, "V-1"]
    log_q: Float[np.ndarray | Array, "V"]

    @classmethod
    def from_counts(
        cls, counts: Int[np.ndarray, "V"], *, alpha: float | int = 0.75, smoothing: float | int = 1
    ) -> "PopularitySampler":
        """Probability proportional to (count + smoothing) ** alpha.

        Args:
          counts: as from `item_counts`; entry 0 is ignored.
          alpha: 1 follows the counts, 0 is uniform.
          smoothing: added to every count; above 0, so that no item has probability 0.
        """
        _check_num_items(len(counts) - 1)
        if counts.min() < 0:
            item = int(counts.argmin())
            raise ValueError(f"counts[{item}] is {counts[item]}; expected 0 or more.")
        if smoothing <= 0:
            raise ValueError(f"smoothing is {smoothing}; expected more than 0.")
        return cls._from_weights((counts[1:] + smoothing) ** float(alpha))

    @classmethod
    def log_uniform(cls, counts: Int[np.ndarray, "V"]) -> "PopularitySampler":
        """Zipf's law over popularity ranks: log(1 + 1 / (rank + 1)) for rank 0, 1, ….

        Args:
          counts: as from `item_counts`; only their order matters, ties go by item number.
        """
        _check_num_items(len(counts) - 1)
        rank = np.empty(len(counts) - 1, dtype=np.int64)
        rank[np.argsort(-counts[1:], kind="stable")] = np.arange(len(rank))
        return cls._from_weights(np.log1p(1 / (rank + 1.0)))

    @classmethod
    def _from_weights(cls, weights: Float64[np.ndarray, "N"]) -> "PopularitySampler":
        q = weights / weights.sum()
        threshold, alias = _alias_table(q)
        return cls(threshold.astype(np.float32), alias + np.int32(1), _log_q(q))

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "..."]:
        """Independent item numbers, with replacement; i32[shape]."""
        bin_key, keep_key = jax.random.split(key)
        threshold, alias = jnp.asarray(self.threshold), jnp.asarray(self.alias)
        bins = jax.random.randint(bin_key, shape, 0, threshold.shape[0], dtype=jnp.int32)
        keep = jax.random.uniform(keep_key, shape) < threshold[bins]
        return jnp.where(keep, bins + 1, alias[bins]).astype(jnp.int32)


def _check_num_items(num_items: int) -> None:
    if num_items < 1:
        raise ValueError(f"there are {num_items} items; expected at least 1.")


def _log_q(q: Float64[np.ndarray, "N"]) -> np.ndarray:
    return np.concatenate([[0.0], np.log(q)]).astype(np.float32)


def _alias_table(q: Float64[np.ndarray, "N"]) -> tuple[np.ndarray, Int32[np.ndarray, "N"]]:
    """Thresholds and aliases (from 0) of the alias method, in closed form.

    Walker's method with one open heavy bin at a time: light bins, in order, take what they
    lack from the open heavy bin; when that falls below 1 it is topped up by the next. With
    running totals of what is lacking and what is in excess, a search finds each bin's partner.
    """
    scaled = q * len(q)
    light, heavy = np.flatnonzero(scaled < 1), np.flatnonzero(scaled >= 1)
    threshold = np.ones(len(q))
    alias = np.arange(len(q), dtype=np.int32)
    if not (len(light) and len(heavy)):
        return threshold, alias
    lacking = np.cumsum(1 - scaled[light])
    excess = np.cumsum(scaled[heavy] - 1)
    partner = np.searchsorted(excess, np.insert(lacking[:-1], 0, 0.0), side="left")
    threshold[light] = scaled[light]
    alias[light] = heavy[np.minimum(partner, len(heavy) - 1)]
    # The light bin that overdraws heavy bin h is the first whose running total exceeds h's.
    overdraw = np.searchsorted(lacking, excess[:-1], side="right")
    topped_up = np.flatnonzero(overdraw < len(lacking))
    left = 1 + excess[topped_up] - lacking[overdraw[topped_up]]
    threshold[heavy[topped_up]] = np.clip(left, 0, 1)
    alias[heavy[topped_up]] = heavy[topped_up + 1]
    return threshold, alias
