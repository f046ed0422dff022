"""Exchanged batches hold the same samples, give the same gradients, and resume anywhere."""

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.data import PrefetchIterator, SequenceDataset, training_batches
from jaxrec.distributed import BalanceConfig, BalancedBatches, InProcess, OverMesh, global_mean
from jaxrec.distributed.sample_buffer import join, pack, stack, unpack
from jaxrec.ops.jagged import JaggedBatch, segment_ids
from jaxrec.sharding import make_mesh, sharded_rows

RANKS, ITEMS, BUDGET = 8, 40, 128


def skewed_dataset(seed: int, users: int = 24) -> SequenceDataset:
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.zipf(1.4, users) + 1, 60)
    sequences = [rng.integers(1, ITEMS + 1, length).tolist() for length in lengths]
    return SequenceDataset.from_sequences(sequences, num_items=ITEMS)


def sources(ranks=RANKS, mode: Any = "sequences", users=24, num_epochs: int | None = 1):
    return [
        iter(training_batches(
            skewed_dataset(rank, users - rank % 3), mode=mode, max_len=60, token_budget=BUDGET,
            max_sequences=6, seed=rank, num_epochs=num_epochs,
        ))
        for rank in range(ranks)
    ]  # fmt: skip


def stage(transport=None, mode: Any = "sequences", **config) -> BalancedBatches:
    options: dict[str, Any] = {"max_sequences": 16, "token_budget": 2 * BUDGET} | config
    transport = transport or InProcess(RANKS)
    return BalancedBatches(sources(mode=mode), transport, BalanceConfig(**options))


def ranks_of(batch: JaggedBatch) -> list[JaggedBatch]:
    return [JaggedBatch(*arrays) for arrays in zip(*batch, strict=True)]


def contents(batches) -> list[tuple]:
    """Every sample with its tokens, times and targets, sorted."""
    found = []
    for batch in batches:
        own = unpack(batch)
        found += [tuple(map(tuple, t.tolist())) for t in np.split(own.tokens, own.starts[1:])]
    return sorted(filter(None, found))


def given_and_balanced(balanced: BalancedBatches, mode: Any = "sequences"):
    given = list(itertools.chain(*sources(mode=mode)))
    return contents(given), [list(ranks_of(batch)) for batch in balanced]


def same(a: JaggedBatch, b: JaggedBatch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["sequences", "prefixes"])
def test_every_sample_is_in_exactly_one_batch(mode):
    given, balanced = given_and_balanced(stage(mode=mode, max_sequences=16), mode)
    assert contents(itertools.chain(*balanced)) == given
    for batch in itertools.chain(*balanced):
        assert batch.item_ids.shape == (2 * BUDGET,)
        assert batch.seq_offsets.shape == (17,)
        assert batch.target_ids.shape == ((2 * BUDGET,) if mode == "sequences" else (16,))


def test_ranks_become_even():
    balanced = stage()
    next(balanced)
    quality = balanced.stats.quality
    assert quality is not None
    before = [unpack(next(source)) for source in sources()]
    tokens = np.array([own.lengths.sum() for own in before])
    assert quality.max_over_mean < tokens.max() / tokens.mean()
    assert quality.moved > 0.5
    assert quality.max_over_mean == pytest.approx(quality.bound, rel=0.05)


def test_over_the_mesh_as_in_the_process():
    mesh = make_mesh({"data": RANKS})
    there, here = stage(OverMesh(mesh, "data")), stage()
    for a, b in itertools.zip_longest(there, here):
        assert same(a, b)


def test_a_packed_batch_is_the_batch_again():
    for mode in ("sequences", "prefixes"):
        batch = next(sources(1, mode)[0])
        slots = len(batch.target_ids)
        again = pack(unpack(batch), token_budget=BUDGET, max_sequences=6, max_targets=slots)
        assert same(batch, again)
    nothing = pack(join([]), token_budget=4, max_sequences=2, max_targets=2)
    assert unpack(nothing).lengths.shape == (0,)
    assert not nothing.seq_offsets.any()


def loss(params, batch):
    """Cross-entropy of the target given the mean of its item and the first of its sample."""
    items, offsets = jnp.asarray(batch.item_ids), jnp.asarray(batch.seq_offsets)
    sample = segment_ids(offsets, len(items))
    first = items[jnp.minimum(offsets[sample], len(items) - 1)]
    hidden = (params["items"][items] + params["items"][first]) / 2
    logits = hidden[batch.target_positions] @ params["items"].T + params["bias"]
    targets = jnp.asarray(batch.target_ids)
    losses = -jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets]
    real = targets != 0
    return jnp.where(real, losses, 0).sum() / jnp.maximum(real.sum(), 1)


def small_params():
    rng = np.random.default_rng(0)
    shapes = {"items": (ITEMS + 1, 8), "bias": (ITEMS + 1,)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def test_gradients_are_those_of_one_batch_with_all_samples():
    params, mesh = small_params(), make_mesh({"data": RANKS})
    step = jax.jit(jax.value_and_grad(global_mean(loss, mesh, "data")))
    unbalanced = stack([next(source) for source in sources()])
    balanced = next(stage())
    few = ranks_of(balanced)[0]
    assert few.seq_offsets[-1] != ranks_of(unbalanced)[0].seq_offsets[-1]
    everything = join([unpack(batch) for batch in ranks_of(unbalanced)])
    whole = pack(everything, token_budget=1024, max_sequences=64, max_targets=1024)
    wanted = jax.jit(jax.value_and_grad(loss))(params, whole)
    put = sharded_rows(mesh, "data")
    for batch in (unbalanced, balanced):
        found = step(params, jax.device_put(batch, put))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_ranks_without_samples_add_nothing():
    params, mesh = small_params(), make_mesh({"data": RANKS})
    one = pack(
        unpack(next(sources(1)[0])).take(np.arange(2)),
        token_budget=BUDGET, max_sequences=6, max_targets=BUDGET,
    )  # fmt: skip
    empty = pack(join([]), token_budget=BUDGET, max_sequences=6, max_targets=BUDGET)
    batches = stack([one] + [empty] * (RANKS - 1))
    found = jax.jit(jax.value_and_grad(global_mean(loss, mesh, "data")))(params, batches)
    wanted = jax.jit(jax.value_and_grad(loss))(params, one)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outliers", [None, 20])
def test_resumes_behind_every_batch(outliers):
    config = {"outlier_tokens": outliers} if outliers else {}
    whole = list(stage(**config))
    assert len(whole) > 3
    for stop in range(len(whole) + 1):
        first = stage(**config)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        second = stage(**config)
        second.set_state(state)
        if not stop:
            assert state == second.get_state()
        rest = list(second)
        assert len(rest) == len(whole) - stop
        assert all(map(same, rest, whole[stop:]))


def test_prefetched_on_a_thread_it_is_the_same():
    plain, ahead = list(stage()), list(PrefetchIterator(stage(), 2))
    assert len(plain) == len(ahead)
    assert all(map(same, plain, ahead))


def test_deferred_outliers_come_back_together():
    balanced = stage(outlier_tokens=20)
    given, found = given_and_balanced(balanced)
    assert contents(itertools.chain(*found)) == given
    assert balanced.stats.held == 0
    numbers = [sum(int((unpack(batch).lengths > 20).sum()) for batch in ranks) for ranks in found]
    assert sum(numbers) > RANKS, "the data has outliers"
    assert all(number == 0 or number >= RANKS for number in numbers[:-1])


def test_split_outliers_lose_nothing_and_capped_ones_are_counted():
    given, found = given_and_balanced(stage(outlier_tokens=20, outliers="split"))
    pieces = [unpack(batch) for batch in itertools.chain(*found)]
    assert max(own.lengths.max(initial=0) for own in pieces) <= 20
    tokens = sorted(itertools.chain(*given))
    assert sorted(itertools.chain(*contents(itertools.chain(*found)))) == tokens
    capped = stage(outlier_tokens=20, outliers="cap")
    kept = sum(int(batch.seq_offsets[-1]) for ranks in map(ranks_of, capped) for batch in ranks)
    assert kept + capped.stats.cut_tokens == len(tokens)
    assert capped.stats.cut_tokens > 0


def test_sources_that_end_early_give_nothing_more():
    short = sources()
    for _ in range(3):
        next(short[5], None)
    given = contents(itertools.chain(*sources()[:5], *sources()[6:], [*sources()[5]][3:]))
    balanced = BalancedBatches(
        short, InProcess(RANKS), BalanceConfig(max_sequences=16, token_budget=2 * BUDGET)
    )
    assert contents(itertools.chain(*map(ranks_of, balanced))) == given
    assert next(balanced, None) is None


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="3 sources for the local ranks"):
        BalancedBatches(sources(3), InProcess(4), BalanceConfig())
    with pytest.raises(ValueError, match="samples do not fit 8 ranks of samples_per_rank=1"):
        next(stage(max_sequences=1))
    with pytest.raises(ValueError, match="tokens, more than a rank's token_budget=8"):
        next(stage(token_budget=8))
    with pytest.raises(ValueError, match="one target each, at their end"):
        next(stage(mode="prefixes", outlier_tokens=20, outliers="split"))
    with pytest.raises(ValueError, match="state of 8 balanced sources was expected"):
        stage().set_state({"sources": []})
    with pytest.raises(ValueError, match="whose only axis above size 1 is 'data'"):
        OverMesh(make_mesh({"data": 4, "model": 2}), "data")
    batch = next(sources(1)[0])
    twice = batch._replace(target_positions=np.zeros_like(batch.target_positions))
    with pytest.raises(ValueError, match="two targets at one token"):
        unpack(twice)
    ended = sources()
    for source in ended:
        list(source)
    with pytest.raises(ValueError, match="no source has a batch"):
        next(BalancedBatches(ended, InProcess(RANKS), BalanceConfig()))
