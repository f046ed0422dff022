import numpy as np
import pytest
from tiny_run import MAX_LEN, NUM_ITEMS, Parts, tiny_model, tiny_split

from jaxrec.data import EvalSet, SequenceDataset, make_query_batch
from jaxrec.functional import copy_params
from jaxrec.ops.metrics import ranking_metrics
from jaxrec.train import evaluate_ranking, make_rank_fn, popularity_ranks, user_ranks
from jaxrec.train.evaluate import MAX_IN_FLIGHT, history_matrix
from jaxrec.train.train import spread


def question_set(rows, targets):
    histories = SequenceDataset.from_sequences(rows, num_items=NUM_ITEMS)
    return EvalSet(histories, np.array(targets, np.int32))


def random_questions(num_users, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, NUM_ITEMS + 1, rng.integers(1, 20)).tolist() for _ in range(num_users)]
    return question_set(rows, rng.integers(1, NUM_ITEMS + 1, num_users))


def naive_ranks(model, questions):
    """One user at a time, in float64, straight from the protocol."""
    table = np.asarray(model.item_embeddings(), np.float64)
    ranks = []
    for user, target in enumerate(questions.targets):
        history = questions.histories.sequence(user)
        batch = make_query_batch(
            questions.histories,
            np.array([user]),
            max_len=MAX_LEN,
            token_budget=MAX_LEN,
            max_sequences=1,
            targets=questions.targets,
        )
        hidden = np.asarray(model.encode(batch))[batch.target_positions[0]]
        scores = table @ hidden.astype(np.float64)
        candidates = set(range(1, NUM_ITEMS + 1)) - set(map(int, history)) | {int(target)}
        candidates.discard(int(target))
        ranks.append(sum(scores[item] >= scores[target] - 1e-9 for item in candidates))
    return np.array(ranks)


@pytest.mark.parametrize("batch_size", [7, 256])
def test_ranks_equal_a_naive_ranking(batch_size):
    model, questions = tiny_model(), random_questions(100)
    in_history = [t in questions.histories.sequence(u) for u, t in enumerate(questions.targets)]
    assert any(in_history)  # such a target stays a candidate
    seen = []
    ranks = user_ranks(
        make_rank_fn(model),
        copy_params(model),
        questions,
        max_len=MAX_LEN,
        batch_size=batch_size,
        progress=lambda done, total: seen.append((done, total)),
    )
    np.testing.assert_array_equal(ranks, naive_ranks(model, questions))
    assert seen == sorted(seen)
    assert seen[-1] == (100, 100)
    assert (len(seen) > MAX_IN_FLIGHT) == (batch_size == 7)


def test_ties_stand_before_the_target():
    model = tiny_model()
    model.table[...] = model.table[...] * 0  # every item scores alike
    questions = question_set([[1, 2, 3], [4]], [5, 4])
    ranks = user_ranks(make_rank_fn(model), copy_params(model), questions, max_len=MAX_LEN)
    np.testing.assert_array_equal(ranks, [NUM_ITEMS - 4, NUM_ITEMS - 1])


def test_metrics_are_those_of_the_ranks():
    model, questions = tiny_model(), random_questions(30)
    rank_fn, params = make_rank_fn(model), copy_params(model)
    metrics = evaluate_ranking(rank_fn, params, questions, max_len=MAX_LEN, cutoffs=(3,))
    ranks = naive_ranks(model, questions)
    assert metrics["hr@3"] == np.mean(ranks < 3)
    assert metrics == ranking_metrics(ranks, (3,))


def test_no_questions_are_an_error_of_the_metrics():
    model, nobody = tiny_model(), question_set([], [])
    rank_fn, params = make_rank_fn(model), copy_params(model)
    assert user_ranks(rank_fn, params, nobody, max_len=MAX_LEN).shape == (0,)
    with pytest.raises(ValueError, match="evaluation set is empty"):
        evaluate_ranking(rank_fn, params, nobody, max_len=MAX_LEN)


def test_histories_are_whole_rows():
    questions = question_set([[1, 2, 3], [4], [5, 6]], [7, 8, 9])
    rows = history_matrix(questions, np.array([2, -1, 0]))
    np.testing.assert_array_equal(rows, [[5, 6, 0], [0, 0, 0], [1, 2, 3]])


def test_popularity_equals_a_naive_ranking():
    rng, questions = np.random.default_rng(1), random_questions(50)
    counts = np.concatenate([[0], rng.integers(0, 6, NUM_ITEMS)])
    by_count = sorted(range(1, NUM_ITEMS + 1), key=lambda item: (-counts[item], item))
    expected = []
    for user, target in enumerate(questions.targets):
        seen = set(map(int, questions.histories.sequence(user))) - {int(target)}
        expected.append([item for item in by_count if item not in seen].index(int(target)))
    np.testing.assert_array_equal(popularity_ranks(counts, questions), expected)


def test_spread_takes_evenly_and_keeps_the_users():
    questions = random_questions(10)
    questions = EvalSet(questions.histories, questions.targets, np.arange(10, dtype=np.int32))
    some = spread(questions, 4)
    np.testing.assert_array_equal(some.user_index, [0, 3, 6, 9])
    np.testing.assert_array_equal(some.targets, questions.targets[[0, 3, 6, 9]])
    np.testing.assert_array_equal(some.histories.sequence(1), questions.histories.sequence(3))
    assert spread(questions, None) is questions
    assert spread(questions, 10) is questions


def test_training_set_of_the_tests_is_learnable():
    """The tiny data follow a rule, so that the other tests can ask for learning."""
    parts, split = Parts(ema_decay=None), tiny_split()
    state, rank_fn = parts.state, make_rank_fn(parts.model)
    before = user_ranks(rank_fn, state.params, split.valid, max_len=MAX_LEN).mean()
    for _ in range(120):
        state, _ = parts.step(state, next(parts.batches))
    after = user_ranks(rank_fn, state.params, split.valid, max_len=MAX_LEN).mean()
    assert after < 0.5 * before
