import numpy as np

from jaxrec.retrieval import brute_force, recall


def test_brute_force_takes_the_best_of_the_eligible():
    table = np.array([[9.0], [1.0], [3.0], [2.0]])
    best = brute_force(np.array([[1.0], [-1.0]]), table, np.array([1, 2, 3]), k=2)
    assert best.tolist() == [[2, 3], [1, 3]]


def test_brute_force_fills_up_with_none():
    best = brute_force(np.ones((1, 1)), np.ones((3, 1)), np.array([2]), k=3)
    assert best.tolist() == [[2, -1, -1]]


def test_recall_counts_what_was_there_to_find():
    truth = np.array([[1, 2, 3, 4], [5, -1, -1, -1]])
    assert recall(np.array([[1, 2, 9, -1], [6, -1, -1, -1]]), truth) == 2 / 5
    assert recall(truth, truth) == 1.0
    assert recall(truth, np.full((2, 4), -1)) == 1.0
