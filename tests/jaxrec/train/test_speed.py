"""The step as the compiler sees it, batches on their way to it, and what is said of its speed."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from tiny_run import MAX_LEN, Parts, tiny_batches, tiny_split

from jaxrec.data import PrefetchIterator, bucket_sizes, cut_to_bucket
from jaxrec.nn import HSTU, HSTUConfig, MoEConfig, SASRec, SASRecConfig, forward_flops
from jaxrec.train import (
    LoopConfig,
    LossConfig,
    Progress,
    TrainConfig,
    TrainingFlops,
    peak_flops,
    training_flops,
    use_compile_cache,
)
from jaxrec.train import utilisation as module


def test_a_step_never_waits_for_the_host_and_updates_in_place():
    parts = Parts()
    compiled: Any = parts.step.lower(parts.state, next(parts.batches)).compile()
    text = compiled.as_text()
    assert not re.findall(r" (?:infeed|outfeed|send|recv|send-done|recv-done)\(", text)
    assert "callback" not in text
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(parts.state))
    assert compiled.memory_analysis().alias_size_in_bytes == state_bytes


def linear_flops(jaxpr):
    """Of all products of a matrix with a matrix: attention's have further axes."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and len(equation.outvars[0].aval.shape) == 2:
            left, (contracted, _) = (
                equation.invars[0].aval.shape,
                equation.params["dimension_numbers"][0],
            )
            out = equation.outvars[0].aval.shape
            total += 2 * np.prod(out) * np.prod([left[axis] for axis in contracted])
        for inner in jaxprs_in_params(equation.params):
            total += linear_flops(inner)
    return total


@pytest.mark.parametrize(
    "model",
    [
        HSTU(HSTUConfig(5, MAX_LEN, width=8, num_heads=2, qk_width=3, v_width=5), rngs=nnx.Rngs(0)),
        SASRec(SASRecConfig(5, MAX_LEN, width=8, num_heads=2, ffn_factor=3), rngs=nnx.Rngs(0)),
    ],
    ids=["hstu", "sasrec"],
)
def test_flops_of_tokens_are_those_of_the_products(model):
    batch = next(tiny_batches(tiny_split()))
    flops: Any = forward_flops(model.config)
    assert flops.token * len(batch.item_ids) == linear_flops(jax.make_jaxpr(model.encode)(batch))


def test_flops_of_pairs_experts_and_losses():
    hstu = HSTUConfig(5, num_blocks=3, num_heads=2, qk_width=3, v_width=5)
    forward: Any = forward_flops(hstu)
    assert forward.pair == 3 * 2 * 2 * (3 + 5)
    moe = MoEConfig(64, num_experts=4, hidden=6, slots=2, shared_hidden=10)
    more: Any = forward_flops(HSTUConfig(5, num_blocks=1, moe=moe))
    without: Any = forward_flops(HSTUConfig(5, num_blocks=1))
    assert more.token - without.token == 2 * 64 * (4 + 2 * 3 * 6 + 3 * 10)
    assert forward_flops("no model") is None
    full: Any = training_flops(hstu, LossConfig(), 1000)
    assert full == TrainingFlops(3 * forward.token, 3 * forward.pair, 3 * 2 * 1000 * 64)
    sampled: Any = training_flops(hstu, LossConfig("sampled", num_negatives=9), 1000)
    assert sampled.target == 3 * 2 * 10 * 64
    assert full.of(tokens=2, pairs=3, targets=4) == 2 * full[0] + 3 * full[1] + 4 * full[2]


def test_pairs_are_counted():
    parts = Parts()
    batch = next(parts.batches)
    _, metrics = parts.step(parts.state, batch)
    lengths = np.diff(batch.seq_offsets)
    assert float(metrics.num_pairs) == (lengths * (lengths + 1) // 2).sum()


def test_speed_as_it_is_shown(monkeypatch):
    assert peak_flops() is None, "nothing is known of a CPU"
    counts = {"tokens": 100.0, "pairs": 10.0, "targets": 1.0}
    shown = module.speed_figures(2.0, **counts, flops=None)
    assert set(shown) == {"tokens/s", "memory GB"}
    assert shown["tokens/s"] == 50
    assert shown["memory GB"] > 0.05
    monkeypatch.setattr(module, "peak_flops", lambda: 1e6 / jax.device_count())
    shown = module.speed_figures(2.0, **counts, flops=TrainingFlops(1e3, 1e4, 2e5))
    assert shown["GFLOP/s"] == pytest.approx(2e-4)
    assert shown["MFU %"] == pytest.approx(20)

    class Device:
        device_kind = "NVIDIA H200"

    assert peak_flops(Device()) == pytest.approx(989.4e12)


def test_buckets_lose_no_token():
    assert bucket_sizes(64, 1) == (64,)
    assert bucket_sizes(100, 3) == (32, 56, 100)
    assert bucket_sizes(16, 9) == (8, 16)
    sizes, seen = bucket_sizes(64, 4), set()
    batches = tiny_batches(tiny_split())
    batch = next(batches)
    for _ in range(12):
        cut, used = cut_to_bucket(batch, sizes), batch.seq_offsets[-1]
        slots = len(cut.item_ids)
        seen.add(slots)
        assert slots == min(size for size in sizes if size >= used)
        np.testing.assert_array_equal(cut.item_ids, batch.item_ids[:slots])
        np.testing.assert_array_equal(cut.target_ids[:used], batch.target_ids[:used])
        assert len(cut.target_positions) == len(cut.timestamps) == slots
        batch = next(batches)
    assert len(seen) > 1, "the last batch of an epoch is smaller"
    prefixes = batch._replace(target_ids=batch.target_ids[:5])
    assert len(cut_to_bucket(prefixes, sizes).target_ids) == 5
    with pytest.raises(ValueError, match="token_buckets is 0"):
        TrainConfig(token_buckets=0)


class Notes(Progress):
    def __init__(self):
        self.notes, self.figures = [], []

    def note(self, text):
        self.notes.append(text)

    def update(self, step, figures):
        self.figures.append(figures)


def test_every_program_is_reported_once(tmp_path):
    sizes, notes, parts = bucket_sizes(64, 4), Notes(), Parts()
    config = LoopConfig(num_steps=25, log_every=5)
    parts.run(
        tmp_path,
        config,
        progress=notes,
        flops=TrainingFlops(1, 1, 1),
        put_batch=lambda batch: cut_to_bucket(batch, sizes),
    )
    reported = [note for note in notes.notes if "token slots" in note]
    assert 2 <= len(reported) <= len(sizes)
    for number, note in enumerate(reported, start=1):
        assert f": program {number}, for batches of " in note
    assert {"loss", "tokens/s", "GFLOP/s", "memory GB"} == set(notes.figures[-1])


def test_batches_are_placed_by_the_thread_that_makes_them():
    plain, placed = (tiny_batches(tiny_split()) for _ in range(2))
    ahead = PrefetchIterator(placed, 2, place=jax.device_put)
    for _ in range(3):
        expected, batch = next(plain), next(ahead)
        assert all(isinstance(part, jax.Array) for part in batch)
        for a, b in zip(expected, batch, strict=True):
            np.testing.assert_array_equal(a, b)
        assert ahead.get_state() == plain.get_state()
    ahead.close()


def test_compile_cache_leaves_a_choice_as_it_is(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert use_compile_cache(tmp_path / "first") == tmp_path / "first"
        assert use_compile_cache(tmp_path / "second") == tmp_path / "first"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "first")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
