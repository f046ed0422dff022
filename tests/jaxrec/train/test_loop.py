import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import Parts

import jaxrec.train.loop as loop_module
from jaxrec.train import (
    CheckpointError,
    CheckpointStore,
    CheckpointWarning,
    ConfigMismatch,
    LastSaveError,
    LoopConfig,
    NonFiniteError,
    OptimizerConfig,
    read_log,
)
from jaxrec.train.progress import LOG_FILE, PlainProgress, RunLog

CONFIG = LoopConfig(num_steps=20, eval_every=6, checkpoint_every=4, log_every=5, keep=2)


class Crash(BaseException):
    """Stands for a process that ends without a chance to tidy up."""


def crash_at(number, error=Crash):
    count = 0

    def put_batch(batch):
        nonlocal count
        count += 1
        if count == number:
            raise error
        return batch

    return put_batch


def signal_at(number, which=signal.SIGTERM):
    count = 0

    def put_batch(batch):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), which)
        return batch

    return put_batch


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run that nothing disturbs: its result and its log."""
    folder = tmp_path_factory.mktemp("unbroken")
    result = Parts().run(folder, CONFIG)
    return jax.device_get(result), (folder / LOG_FILE).read_text()


def assert_same_run(result, folder, unbroken):
    expected, log = unbroken
    for part in ("state", "best_state"):
        ours, theirs = getattr(result, part), getattr(expected, part)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), b)
    assert result.history == expected.history
    assert result.best_step == expected.best_step
    assert (folder / LOG_FILE).read_text() == log


def test_run_is_logged_evaluated_and_saved(unbroken, tmp_path):
    result, log = unbroken
    lines = [json.loads(line) for line in log.splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "train"] == [5, 10, 15, 20]
    assert [x["step"] for x in lines if x["kind"] == "eval"] == [6, 12, 18]
    assert [x["step"] for x in result.history] == [6, 12, 18]
    assert result.stopped_because == "done"
    assert int(result.state.step) == 20
    best = max(result.history, key=lambda entry: entry["ndcg@10"])
    assert result.best_step == best["step"] == int(result.best_state.step)
    first, last = [x["loss"] for x in lines if x["kind"] == "train"][:: len(lines) - 4]
    assert last < first


@pytest.mark.parametrize("crashes", [(3,), (7, 2, 9), (5, 5, 5, 5)])
def test_crashed_and_resumed_equals_unbroken(tmp_path, unbroken, crashes):
    for number in crashes:
        with pytest.raises(Crash):
            Parts().run(tmp_path, CONFIG, put_batch=crash_at(number))
    result = Parts(prefetch=2).run(tmp_path, CONFIG)
    assert_same_run(result, tmp_path, unbroken)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_stops_and_resumes_exactly(tmp_path, unbroken, which):
    before = signal.getsignal(which)
    stopped = Parts().run(tmp_path, CONFIG, put_batch=signal_at(7, which))
    assert stopped.stopped_because == which.name
    assert int(stopped.state.step) == 7
    assert signal.getsignal(which) is before
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert store.steps[-1] == 7
    assert_same_run(Parts().run(tmp_path, CONFIG), tmp_path, unbroken)


def test_second_signal_acts_as_usual(tmp_path):
    def twice(batch):
        os.kill(os.getpid(), signal.SIGINT)
        return batch

    def slow_evaluate(state):
        os.kill(os.getpid(), signal.SIGINT)
        return {"ndcg@10": 0.0}

    config = LoopConfig(num_steps=4, eval_every=1)
    # A shell's background jobs inherit an ignored SIGINT; here the usual one is wanted.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Parts().run(tmp_path, config, put_batch=twice, evaluate=slow_evaluate)
    finally:
        signal.signal(signal.SIGINT, before)


def test_finished_run_is_returned_again(tmp_path, unbroken):
    Parts().run(tmp_path, CONFIG)

    def no_more(batch):
        raise AssertionError("a finished run takes no step")

    assert_same_run(Parts().run(tmp_path, CONFIG, put_batch=no_more), tmp_path, unbroken)


def test_longer_run_goes_on_from_the_shorter(tmp_path, unbroken):
    Parts().run(tmp_path, LoopConfig(num_steps=10, eval_every=6, checkpoint_every=4, log_every=5))
    assert_same_run(Parts().run(tmp_path, CONFIG), tmp_path, unbroken)


def test_patience_stops_and_a_resumed_run_stays_stopped(tmp_path):
    scores = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.9])
    config = LoopConfig(num_steps=12, eval_every=2, patience=3)
    options = {"evaluate": lambda state: {"ndcg@10": next(scores)}}
    result = Parts().run(tmp_path, config, **options)
    assert result.stopped_because == "patience"
    assert int(result.state.step) == 10
    assert result.best_step == int(result.best_state.step) == 4
    again = Parts().run(tmp_path, config, **options)
    assert again.stopped_because == "patience"
    assert int(again.state.step) == 10
    assert again.best_step == int(again.best_state.step) == 4
    longer = LoopConfig(num_steps=12, eval_every=2, patience=4)
    more = Parts().run(tmp_path, longer, **options)
    assert more.stopped_because == "done"
    assert more.best_step == 12


def poison(at, leaf=0):
    """A step function that meets a NaN parameter at one step."""

    def wrap(step):
        def poisoned(state, batch):
            if int(state.step) + 1 != at:
                return step(state, batch)
            kept = jax.tree.map(jnp.copy, state.params)
            flat, tree = jax.tree.flatten(state.params)
            flat[leaf] = flat[leaf] * jnp.nan
            state, metrics = step(state._replace(params=jax.tree.unflatten(tree, flat)), batch)
            return state._replace(params=kept), metrics

        return poisoned

    return wrap


def test_nonfinite_names_step_and_parameter_and_saves(tmp_path):
    parts = Parts()
    parts.step = poison(at=8)(parts.step)
    with pytest.raises(NonFiniteError, match=r"step 8: .*'kernel' is not finite") as caught:
        parts.run(tmp_path, CONFIG)
    assert str(tmp_path) in str(caught.value)
    with CheckpointStore(tmp_path, read_only=True) as store:
        restored = store.restore(Parts().state)
    assert restored.step == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.state.params))
    result = Parts().run(tmp_path, CONFIG)  # the step is behind it
    assert int(result.state.step) == 20


def test_nan_in_evaluation_is_an_error(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 6: the evaluation's 'ndcg@10' is NaN"):
        Parts().run(tmp_path, CONFIG, evaluate=lambda state: {"ndcg@10": float("nan")})


def test_missing_monitor_is_an_error_with_the_choice(tmp_path):
    with pytest.raises(ValueError, match=r"monitor 'ndcg@10' is not among .*'auc'"):
        Parts().run(tmp_path, CONFIG, evaluate=lambda state: {"auc": 0.5})


def test_other_configuration_is_refused_but_the_loop_s_may_differ(tmp_path):
    short = LoopConfig(num_steps=4)
    Parts().run(tmp_path, short, model_config={"model": {"width": 8}, "train": {"keep": 2}})
    with pytest.raises(ConfigMismatch, match=r"model\.width: saved 8, now 16") as caught:
        Parts().run(tmp_path, CONFIG, model_config={"model": {"width": 16}, "train": {"keep": 3}})
    assert "loop" not in str(caught.value)
    assert "keep" not in str(caught.value)


def test_resume_can_be_refused(tmp_path):
    Parts().run(tmp_path, LoopConfig(num_steps=2))
    with pytest.raises(CheckpointError, match=r"already holds a run \(steps \[2\]\)"):
        Parts().run(tmp_path, LoopConfig(num_steps=2), resume=False)


def test_damaged_newest_checkpoint_costs_steps_but_nothing_else(tmp_path, unbroken):
    with pytest.raises(Crash):
        Parts().run(tmp_path, CONFIG, put_batch=crash_at(10))
    (tmp_path / "checkpoints" / "8" / "meta" / "metadata").write_text("{")
    with pytest.warns(CheckpointWarning, match=r"step 8 is damaged .* using step 6 instead"):
        result = Parts().run(tmp_path, CONFIG)
    assert_same_run(result, tmp_path, unbroken)
    gc.collect()


class FailingSaves:
    """Makes saves of the given steps fail as on a full disk."""

    def __init__(self, monkeypatch, steps, *, times=1000):
        save, left = CheckpointStore.save, [times]

        def failing(store, step, *args, **kwargs):
            if step in steps and left[0]:
                left[0] -= 1
                raise CheckpointError("no space left on device.")
            save(store, step, *args, **kwargs)

        monkeypatch.setattr(CheckpointStore, "save", failing)


def test_training_goes_on_over_failed_saves(tmp_path, unbroken, monkeypatch):
    FailingSaves(monkeypatch, {4, 8, 12, 16})
    with pytest.warns(CheckpointWarning, match="no space left"):
        result = Parts().run(tmp_path, CONFIG)
    assert int(result.state.step) == 20
    assert (tmp_path / LOG_FILE).read_text() == unbroken[1]


@pytest.mark.filterwarnings("ignore:no space left:jaxrec.train.CheckpointWarning")
def test_lost_best_checkpoint_is_said(tmp_path, unbroken, monkeypatch):
    FailingSaves(monkeypatch, {6, 12, 18})
    scores = iter([0.1, 0.9, 0.2])
    with pytest.warns(CheckpointWarning, match="the best step 12 cannot be restored"):
        result = Parts().run(tmp_path, CONFIG, evaluate=lambda state: {"ndcg@10": next(scores)})
    assert result.best_step == int(result.best_state.step) == 20


def test_failed_last_save_is_tried_again(tmp_path, monkeypatch):
    FailingSaves(monkeypatch, {20}, times=2)  # in passing, then at the end
    config = LoopConfig(num_steps=20, checkpoint_every=20)
    with pytest.warns(CheckpointWarning):
        result = Parts().run(tmp_path, config)
    assert int(result.state.step) == 20
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert store.steps == [20]


@pytest.mark.filterwarnings("ignore:no space left:jaxrec.train.CheckpointWarning")
def test_failed_last_save_is_an_error_with_the_result(tmp_path, unbroken, monkeypatch):
    FailingSaves(monkeypatch, {20})
    with pytest.raises(LastSaveError, match=r"after step 20 \(done\), but no space") as caught:
        Parts().run(tmp_path, CONFIG)
    monkeypatch.undo()
    assert_same_run(caught.value.result, tmp_path, unbroken)
    assert_same_run(Parts().run(tmp_path, CONFIG), tmp_path, unbroken)


def test_batches_that_end_end_the_run(tmp_path):
    parts = Parts()
    batches = [next(parts.batches) for _ in range(3)]

    class Three:
        position = 0

        def __next__(self):
            if self.position == 3:
                raise StopIteration
            self.position += 1
            return batches[self.position - 1]

        def get_state(self):
            return {"position": self.position}

    parts.batches = Three()
    result = parts.run(tmp_path, CONFIG)
    assert result.stopped_because == "out of batches"
    assert int(result.state.step) == 3
    assert [x["step"] for x in read_log(tmp_path)] == [3]


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_steps", 0), ("log_every", 0), ("keep", 0), ("eval_every", -1), ("patience", -2)],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        replace(CONFIG, **{field: value})


def test_log_tolerates_a_cut_last_line_and_drops_later_steps(tmp_path):
    lines = [json.dumps({"step": step, "kind": "train", "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / LOG_FILE).write_text("\n".join(lines) + '\n{"step": 4, "ki')
    assert [x["step"] for x in read_log(tmp_path)] == [1, 2, 3]
    log = RunLog(tmp_path, first_step=2)
    log.write(3, "eval", {"mrr": 0.5})
    log.close()
    assert [(x["step"], x["kind"]) for x in read_log(tmp_path)] == [
        (1, "train"),
        (2, "train"),
        (3, "eval"),
    ]
    assert read_log(tmp_path, "eval") == [{"step": 3, "kind": "eval", "mrr": 0.5}]
    assert read_log(tmp_path / "absent") == []


def test_broken_line_inside_the_log_is_named(tmp_path):
    (tmp_path / LOG_FILE).write_text('{"step": 1, "kind": "train"}\n7\n{"step": 2, "kind": "x"}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not an object"):
        read_log(tmp_path)


def test_lines_that_cannot_be_written_follow_later(tmp_path):
    log, written = RunLog(tmp_path, first_step=0), []

    class FullDisk:
        name = "log.jsonl"

        def write(self, data):
            if len(written) == 1:
                raise OSError(28, "No space left on device")
            written.append(data[:10])
            return len(written[-1])

    full: Any = FullDisk()
    file, log._file = log._file, full
    with pytest.warns(UserWarning, match=r"log\.jsonl lags behind"):
        log.write(1, "train", {"loss": 1.0})
    file.write(written[0])
    log._file = file
    log.write(2, "train", {"loss": 0.5})
    log.close()
    assert [x["step"] for x in read_log(tmp_path)] == [1, 2]


def test_plain_progress_prints_at_its_pace(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = PlainProgress(0, 100, every_s=30.0)
    for step in range(1, 41):
        now[0] += 1.0
        progress.update(step, {"loss": 2.5})
    assert capsys.readouterr().out == "step 30/100  loss 2.5  70 s left\n"


def test_quiet_run_prints_nothing(tmp_path, capfd):
    Parts().run(tmp_path, CONFIG)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def run_program(folder, output, *arguments):
    script = Path(__file__).with_name("tiny_run.py")
    command = [sys.executable, str(script), str(folder), str(output), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_killed_processes_end_as_the_unbroken_one(tmp_path):
    reference = run_program(tmp_path / "a", tmp_path / "a.npz")
    assert reference.returncode == 0, reference.stderr
    for number in np.random.default_rng(0).integers(2, 18, 4):
        killed = run_program(tmp_path / "b", tmp_path / "b.npz", "--kill-at", str(number))
        assert killed.returncode == -signal.SIGKILL
    stopped = run_program(tmp_path / "b", tmp_path / "b.npz", "--terminate-at", "2")
    assert stopped.returncode == 0, stopped.stderr
    assert str(np.load(tmp_path / "b.npz")["why"]) == "SIGTERM"
    resumed = run_program(tmp_path / "b", tmp_path / "b.npz")
    assert resumed.returncode == 0, resumed.stderr
    first, second = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert first.files == second.files
    for name in first.files:
        np.testing.assert_array_equal(first[name], second[name])
    assert (tmp_path / "a" / LOG_FILE).read_bytes() == (tmp_path / "b" / LOG_FILE).read_bytes()


def test_may_differ_names_exist():
    from jaxrec.train import TrainConfig

    names = {name.removeprefix("train.") for name in loop_module.MAY_DIFFER if "." in name}
    assert names <= set(TrainConfig.__dataclass_fields__)
    assert OptimizerConfig() == TrainConfig().optimizer
