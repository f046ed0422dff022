"""What holds for every sequence model, whatever its options."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from model_cases import EVERY, FEW, MAX_LEN, NUM_ITEMS, build, encode, encoder, pack, tolerance

from jaxrec.ops.losses import full_softmax_loss

SEQUENCES = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [11], [2, 7, 1, 8, 2, 8])
NUM_TOKENS, NUM_SEQUENCES = 32, 5


def batch_of(*sequences, seed=0):
    return pack(sequences, num_tokens=NUM_TOKENS, num_sequences=NUM_SEQUENCES, seed=seed)


def loss_of(model, batch, key=None):
    hidden = model.encode(batch, key=key)[batch.target_positions]
    table = model.item_embeddings().astype(hidden.dtype)
    return full_softmax_loss(hidden, table, jnp.asarray(batch.target_ids))


@pytest.fixture(scope="module", params=EVERY.values(), ids=list(EVERY))
def case(request):
    """A configuration, its parameters and its jitted encoder; compiled once for all tests."""
    return request.param, *encoder(request.param)


@pytest.fixture(params=FEW.values(), ids=list(FEW))
def config(request):
    return request.param


def test_output_is_finite_for_every_slot(case):
    _, params, encode = case
    hidden = encode(params, batch_of(*SEQUENCES))
    assert hidden.shape == (NUM_TOKENS, 8)
    assert np.isfinite(hidden).all()


def test_later_items_never_change_earlier_outputs(case):
    _, params, encode = case
    first, *others = SEQUENCES
    hidden = encode(params, batch_of(first, *others))
    for place in (0, 9, 17):
        changed = [*first[:place], first[place] % NUM_ITEMS + 1, *first[place + 1 :]]
        again = encode(params, batch_of(changed, *others))
        np.testing.assert_array_equal(hidden[:place], again[:place])
        np.testing.assert_array_equal(hidden[len(first) :], again[len(first) :])
        assert np.abs(hidden[place] - again[place]).max() > 1e-3


def test_appended_items_change_earlier_outputs_only_of_positions_from_the_end(case):
    config, params, encode = case
    for sequence in SEQUENCES[:1] + SEQUENCES[2:]:
        short = encode(params, batch_of(sequence[:-2]))[: len(sequence) - 2]
        long = encode(params, batch_of(sequence))[: len(sequence) - 2]
        if getattr(config, "positions", "start") == "start":
            np.testing.assert_allclose(short, long, atol=tolerance(config))
        else:
            assert np.abs(short - long).max() > 1e-2


def test_packed_equals_one_by_one(case):
    config, params, encode = case
    together = encode(params, batch_of(*SEQUENCES))
    start = 0
    for sequence in SEQUENCES:
        batch, end = batch_of(sequence), start + len(sequence)
        times = np.roll(batch_of(*SEQUENCES).timestamps, -start)
        alone = encode(params, batch._replace(timestamps=times))[: len(sequence)]
        np.testing.assert_allclose(alone, together[start:end], atol=tolerance(config))
        start = end


def test_padding_slots_and_the_padding_row_have_no_effect(case):
    _, params, encode = case
    batch = batch_of(*SEQUENCES)
    end = batch.seq_offsets[-1]
    hidden = encode(params, batch)[:end]
    items, times = batch.item_ids.copy(), batch.timestamps.copy()
    items[end:], times[end:] = 5, 0
    filled = batch._replace(item_ids=items, timestamps=times)
    np.testing.assert_array_equal(hidden, encode(params, filled)[:end])
    loud = jax.tree.map(jnp.copy, params)
    loud["items"]["table"][...] = loud["items"]["table"][...].at[0].set(1e3)
    np.testing.assert_array_equal(hidden, encode(loud, batch)[:end])


def test_order_of_items_matters(case):
    _, params, encode = case
    forward = encode(params, batch_of([1, 2, 3]))
    swapped = encode(params, batch_of([2, 1, 3]))
    assert np.abs(forward[2] - swapped[2]).max() > 1e-4


def test_gradient_reaches_every_parameter_but_the_padding_row(config):
    graphdef, params = nnx.split(build(config))
    batch = batch_of(*SEQUENCES)
    batch.target_ids[MAX_LEN - 1] = 1  # the first sequence's last position is scored as well
    grads = jax.jit(jax.grad(lambda p: loss_of(nnx.merge(graphdef, p), batch)))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path
    assert not np.asarray(grads["items"]["table"][...][0]).any()
    if "positions" in grads:
        assert (np.abs(grads["positions"][...]).max(axis=1) > 0).all()
    if "position_bias" in grads["blocks"][0]:
        assert (np.abs(grads["blocks"][0]["position_bias"][...]).max(axis=0) > 0).all()


@pytest.mark.slow
def test_one_batch_is_learnt_by_heart(config):
    batch = batch_of([1, 2, 3, 4, 5, 6], [7, 8, 9, 10], [12, 11])
    last = batch.seq_offsets[1:4] - 1
    batch.target_ids[last] = 0
    graphdef, params = nnx.split(build(config))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graphdef, p), batch))(
                params
            )
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), length=250)[1]

    losses = np.asarray(train(params))
    assert losses[0] > 1.5
    assert losses[-1] < 0.05


def test_dropout_needs_a_key_and_follows_it(config):
    params, encode = encoder(config)
    batch = batch_of(*SEQUENCES)
    plain = encode(params, batch)
    first, second = (encode(params, batch, jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(plain, encode(params, batch))
    np.testing.assert_array_equal(first, encode(params, batch, jax.random.key(0)))
    assert np.abs(first - plain).max() > 0.01
    assert np.abs(first - second).max() > 0.01


def test_split_and_merge_give_the_same_model(config):
    model, batch = build(config), batch_of(*SEQUENCES)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    merged = nnx.merge(graphdef, params, rest)
    own, other = (encode(*nnx.split(each), batch) for each in (model, merged))
    np.testing.assert_array_equal(own, other)


def test_no_variable_is_shared(config):
    model = build(config)
    paths = [
        (name, variable)
        for name, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
        for name, variable in vars(node).items()
        if isinstance(variable, nnx.Variable)
    ]
    assert len(paths) == len({id(variable) for _, variable in paths})
    assert len(paths) == len(jax.tree.leaves(nnx.state(model)))


def leaves(config, seed):
    return nnx.to_pure_dict(nnx.state(build(config, seed)))


def drawn_kernels(block):
    names = [name for name in ("uvqk", "out", "up", "down") if name in block]
    experts = [block["moe"]["router"]] if "moe" in block else []
    return [part["kernel"] for part in [*(block[name] for name in names), *experts]]


def test_a_seed_decides_the_parameters_and_blocks_differ(config):
    one, same, other = (leaves(config, seed) for seed in (0, 0, 1))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, same)))
    assert (one["items"]["table"] != other["items"]["table"]).any()
    blocks = one["blocks"]
    for first, second in zip(jax.tree.leaves(blocks[0]), jax.tree.leaves(blocks[1]), strict=True):
        assert first.shape == second.shape
    for first, second in zip(*map(drawn_kernels, (blocks[0], blocks[1])), strict=True):
        assert (first != second).any()
