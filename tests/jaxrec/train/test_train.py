from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_run import MAX_LEN, NUM_ITEMS, tiny_model, tiny_split

from jaxrec.nn import SASRec, SASRecConfig
from jaxrec.train import (
    ConfigMismatch,
    Progress,
    TrainConfig,
    evaluate_ranking,
    make_rank_fn,
    train,
    with_params,
)

CONFIG = TrainConfig(token_budget=64, max_sequences=16, num_epochs=2, ema_decay=0.9)


def sasrec():
    config = SASRecConfig(num_items=NUM_ITEMS, max_len=MAX_LEN, width=8, num_blocks=1)
    return SASRec(config, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_sasrec_is_trained_and_resumed(tmp_path):
    model, split = sasrec(), tiny_split()
    first = train(model, split, config=CONFIG, folder=tmp_path, progress=Progress())
    longer = TrainConfig(token_budget=64, max_sequences=16, num_epochs=4, ema_decay=0.9, patience=9)
    second = train(model, split, config=longer, folder=tmp_path, progress=Progress())
    assert len(first.history) == 2
    assert second.history[:2] == first.history
    assert len(second.history) == 4
    assert int(second.state.step) == 2 * int(first.state.step)
    trained = with_params(model, second.best_state.eval_params)
    rank_fn, params = make_rank_fn(trained), nnx.state(trained, nnx.Param)
    metrics = evaluate_ranking(rank_fn, params, split.valid, max_len=MAX_LEN)
    best = next(entry for entry in second.history if entry["step"] == second.best_step)
    assert metrics["ndcg@10"] == best["ndcg@10"]
    for leaf in jax.tree.leaves(params):
        assert np.isfinite(leaf).all()


def test_other_settings_are_named_on_resuming(tmp_path):
    model, split = tiny_model(), tiny_split()
    train(model, split, config=CONFIG, folder=tmp_path, progress=Progress())
    other = TrainConfig(token_budget=32, max_sequences=16, num_epochs=2, ema_decay=0.9)
    with pytest.raises(ConfigMismatch, match=r"\n  train\.token_budget: saved 64, now 32\n"):
        train(model, split, config=other, folder=tmp_path, progress=Progress())


def test_model_with_too_few_items_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the model has 39 items, the data 40"):
        train(tiny_model(num_items=39), tiny_split(), config=CONFIG, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["num_epochs", "eval_every", "eval_users"])
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        replace(CONFIG, **{field: 0})
