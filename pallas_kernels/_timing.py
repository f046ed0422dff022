"""A timer for work on the device: interleaved variants, a cold L2 cache, quantiles."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GPU_CALLS = 10
_GPU_FLUSH_BYTES = 256 * 2**20  # five times an H200's L2; long enough to hide every launch


@dataclass(frozen=True)
class Timing:
    """Times of one variant, in microseconds a call."""

    samples_us: tuple[float, ...]

    def quantile_us(self, q: float) -> float:
        """The q-quantile of the samples, q in [0, 1]."""
        return float(np.quantile(self.samples_us, q))

    @property
    def p20_us(self) -> float:
        """A fast run."""
        return self.quantile_us(0.2)

    @property
    def p50_us(self) -> float:
        """The median: what a table states."""
        return self.quantile_us(0.5)

    @property
    def p80_us(self) -> float:
        """A slow run."""
        return self.quantile_us(0.8)


def time_interleaved(
    variants: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 20,
    calls: int | None = None,
    flush_bytes: int | None = None,
) -> dict[str, Timing]:
    """Times each variant `repeats` times, taking turns so that drift hits all alike.

    A sample enqueues `calls` pairs of (write `flush_bytes`, call), waits for the device, and takes
    off the time of the writes alone, measured beside it. The writes empty the L2 cache and keep the
    device busy while the host launches, so a sample holds device time and the gaps between the
    kernels of one call, but no launch from the host.

    Args:
      variants: functions of no arguments that return arrays, compiled by a first call here.
      repeats: samples of each variant.
      calls: calls in a sample; None takes 10 on a GPU and 1 on a CPU.
      flush_bytes: size of the buffer written between calls; None takes 256 MiB on a GPU and 0, no
        writes, on a CPU, where a sample is wall-clock time.
    """
    if not variants or repeats < 1:
        raise ValueError(f"nothing to time: {len(variants)} variants, {repeats} repeats")
    on_gpu = jax.default_backend() == "gpu"
    calls = calls or (_GPU_CALLS if on_gpu else 1)
    flush = _Flush((_GPU_FLUSH_BYTES if on_gpu else 0) if flush_bytes is None else flush_bytes)
    for call in variants.values():
        for _ in range(2):
            jax.block_until_ready(call())
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            writes = _seconds(lambda: None, calls, flush) if flush.is_on else 0.0
            seconds = _seconds(variants[name], calls, flush) - writes
            samples[name].append(max(seconds, 0.0) / calls * 1e6)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def copy_of(num_bytes: int) -> Callable[[], jax.Array]:
    """Reads half of `num_bytes` and writes the other half: what the memory can do."""
    source = jnp.zeros(num_bytes // 8, jnp.uint32)
    return functools.partial(jax.jit(lambda x: x + 1), source)


def _seconds(call: Callable[[], Any], calls: int, flush: "_Flush") -> float:
    written, result = jax.block_until_ready(flush.write()), None
    start = time.perf_counter()
    for _ in range(calls):
        written = flush.write()
        result = call()
    jax.block_until_ready((written, result))
    return time.perf_counter() - start


class _Flush:
    """A buffer larger than the cache; writing it throws everything else out."""

    def __init__(self, num_bytes: int):
        self.is_on = num_bytes > 0
        self._buffer = jnp.zeros(num_bytes // 4, jnp.uint32)
        self._bump = jax.jit(lambda x: x + 1, donate_argnums=0)

    def write(self) -> jax.Array:
        if self.is_on:
            self._buffer = self._bump(self._buffer)
        return self._buffer
