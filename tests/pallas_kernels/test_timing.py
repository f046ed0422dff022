"""The timer orders variants by their work and takes the flush off."""

import time

import jax.numpy as jnp
import pytest

from pallas_kernels._timing import Timing, time_interleaved


def sleeper(seconds):
    def call():
        time.sleep(seconds)
        return jnp.zeros(1)

    return call


def test_samples_are_microseconds_a_call():
    timings = time_interleaved(
        {"short": sleeper(0.002), "long": sleeper(0.02)}, repeats=5, calls=2, flush_bytes=0
    )
    assert all(len(timing.samples_us) == 5 for timing in timings.values())
    assert 2_000 <= timings["short"].p50_us < timings["long"].p50_us
    assert 20_000 <= timings["long"].p20_us <= timings["long"].p50_us <= timings["long"].p80_us


def test_flush_time_is_taken_off():
    timing = time_interleaved({"nothing": lambda: jnp.zeros(1)}, repeats=5, flush_bytes=2**25)
    alone = time_interleaved({"write": lambda: jnp.zeros(2**23) + 1}, repeats=5, flush_bytes=0)
    assert timing["nothing"].p50_us < alone["write"].p50_us


def test_quantiles_and_errors():
    assert Timing((1.0, 2.0, 3.0)).quantile_us(0.5) == 2.0
    with pytest.raises(ValueError, match="nothing to time: 0 variants"):
        time_interleaved({})
