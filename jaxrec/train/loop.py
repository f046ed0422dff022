"""The training loop: steps, guard, evaluation, early stop, checkpoints, exact resume."""

import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrec.ops.jagged import JaggedBatch
from jaxrec.train.checkpoint import CheckpointError, CheckpointStore, CheckpointWarning
from jaxrec.train.progress import Progress, RunLog, make_progress
from jaxrec.train.step import StepMetrics, TrainState, TrainStep

MAY_DIFFER = ("loop.num_steps", "loop.log_every", "loop.keep", "loop.patience", "train.num_epochs")


class NonFiniteError(FloatingPointError):
    """Training met NaN or infinity; the message names step and parameter."""


@dataclass(frozen=True)
class LoopConfig:
    """When the loop does what; all in steps.

    Attributes:
      eval_every: evaluates, and after it saves a checkpoint; 0 never evaluates.
      checkpoint_every: saves in between; 0 saves only after evaluations and at the end.
      log_every: steps between lines of the log; device results are fetched only then.
      patience: evaluations without a better `monitor` before it stops; 0 never stops early.
      keep: newest checkpoints kept, besides the best.
    """

    num_steps: int
    eval_every: int = 0
    checkpoint_every: int = 0
    log_every: int = 20
    patience: int = 0
    monitor: str = "ndcg@10"
    keep: int = 2

    def __post_init__(self):
        if self.num_steps < 1 or self.log_every < 1:
            raise ValueError(
                f"num_steps is {self.num_steps} and log_every {self.log_every}; "
                "both must be at least 1"
            )


class LoopResult(NamedTuple):
    """What `run_loop` returns.

    Attributes:
      state: after the last step.
      best_state: at the best evaluation, or the last one if none was made.
      history: the metrics of every evaluation, with their `step`.
      stopped_because: "done", "patience" or the name of the signal.
    """

    state: TrainState
    best_state: TrainState
    history: list[dict[str, float]]
    best_step: int | None
    stopped_because: str


class _Run:
    """The mutable side of one call of `run_loop`."""

    def __init__(
        self,
        store: CheckpointStore,
        log: RunLog,
        progress: Progress,
        config: LoopConfig,
        full_config: Mapping[str, Any],
        param_names: Sequence[str],
    ):
        self.store, self.log, self.progress, self.config = store, log, progress, config
        self.full_config, self.param_names = full_config, param_names
        self.history: list[dict[str, float]] = []
        self.pending: list[tuple[int, StepMetrics]] = []
        self.saved_step = -1
        self.window_start = time.monotonic()

    def fetch(self) -> None:
        """Gets the buffered step metrics from the device, checks them, logs their means."""
        if not self.pending:
            return
        steps = [step for step, _ in self.pending]
        fetched = jax.device_get([metrics for _, metrics in self.pending])
        self.pending = []
        for step, metrics in zip(steps, fetched, strict=True):
            if metrics.nonfinite >= 0:
                raise NonFiniteError(
                    f"step {step}: the gradient of {self.param_names[int(metrics.nonfinite)]!r} "
                    f"is not finite (loss {float(metrics.loss):g}). The weights before this step "
                    "are saved. Lower the learning rate, clip gradients, or look at the batch."
                )
        seconds = max(time.monotonic() - self.window_start, 1e-9)
        self.window_start = time.monotonic()
        last = fetched[-1]
        figures = {
            "loss": float(np.mean([m.loss for m in fetched])),
            "grad_norm": float(np.mean([m.grad_norm for m in fetched])),
            "learning_rate": float(last.learning_rate),
        }
        self.log.write(steps[-1], "train", figures)
        rate = sum(int(m.num_tokens) for m in fetched) / seconds
        self.progress.update(steps[-1], {"loss": figures["loss"], "tokens/s": rate})

    def save(self, step: int, state: TrainState, iterator_state: Mapping[str, Any]) -> None:
        """Saves a checkpoint; a failure is a warning here, as training itself is unharmed."""
        newest = self.history[-1] if self.history else {}
        metrics = newest if newest.get("step") == step else None
        try:
            self.store.save(
                step,
                state,
                iterator_state=iterator_state,
                config=self.full_config,
                metrics=metrics,
                progress={"history": self.history},
            )
            self.saved_step = step
        except CheckpointError as error:
            warnings.warn(str(error), CheckpointWarning, stacklevel=2)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records an evaluation."""
        if self.config.patience and self.config.monitor not in metrics:
            raise ValueError(
                f"monitor {self.config.monitor!r} is not among the metrics {sorted(metrics)}"
            )
        self.history.append({"step": step, **metrics})
        self.log.write(step, "eval", metrics)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.progress.note(f"step {step}: {shown}")

    @property
    def best(self) -> dict[str, float] | None:
        """The evaluation with the largest monitored metric, the first of equals."""
        scored = [h for h in self.history if self.config.monitor in h]
        return max(scored, key=lambda h: h[self.config.monitor]) if scored else None

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        if not self.config.patience or self.best is None:
            return False
        since_best = len(self.history) - 1 - self.history.index(self.best)
        return since_best >= self.config.patience


def run_loop(
    state: TrainState,
    step_fn: TrainStep,
    batches: Any,
    *,
    config: LoopConfig,
    folder: str | Path,
    model_config: Mapping[str, Any],
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    resume: bool = True,
    param_names: Sequence[str],
    put_batch: Callable[[JaggedBatch], JaggedBatch] = lambda batch: batch,
) -> LoopResult:
    """Trains until `num_steps`, early stop or a signal; called again, it goes on from there.

    A resumed run ends bit-identical to one that was never stopped, as long as machine, versions
    and configuration are the same.

    Args:
      state: the first state; donated.
      batches: an iterator of batches with `get_state()` and `set_state()`.
      folder: of the run; see `CheckpointStore`. `log.jsonl` and `tensorboard/` are written there.
      model_config: stored with every checkpoint and compared on resume.
      evaluate: metrics of a state; larger `monitor` is better.
      resume: False refuses a folder that holds checkpoints.
      param_names: name of every leaf of `state.params`, for errors.

    Raises:
      NonFiniteError: NaN or infinity; the last good weights are saved first.
      CheckpointError: the folder is in use, or the last checkpoint could not be written.
      ConfigMismatch: the folder holds a run with another configuration.
    """
    full_config = {**model_config, "loop": asdict(config)}
    with CheckpointStore(folder, keep=config.keep, best_metric=config.monitor) as store:
        history: list[dict[str, float]] = []
        if store.steps:
            if not resume:
                raise CheckpointError(
                    f"{store.folder} already holds a run (steps {store.steps}); resume it, or "
                    "give another folder"
                )
            restored = store.restore(state, config=full_config, may_differ=MAY_DIFFER)
            state = restored.state
            batches.set_state(restored.iterator_state)
            history = restored.progress["history"]
        first_step = int(state.step)
        log = RunLog(store.folder, first_step)
        progress = make_progress(first_step, config.num_steps)
        run = _Run(store, log, progress, config, full_config, param_names)
        run.history = history
        if first_step:
            progress.note(f"resuming after step {first_step}")
        try:
            with _Signals() as signals:
                state, why = _steps(
                    state, step_fn, batches, run, evaluate, signals, first_step, put_batch
                )
            store.wait()
            best = run.best
            best_state = state
            if best is not None and best["step"] != int(state.step) and best["step"] in store.steps:
                best_state = store.restore(state, step=int(best["step"])).state
            return LoopResult(
                state, best_state, run.history, None if best is None else int(best["step"]), why
            )
        finally:
            progress.close()
            log.close()


def _steps(
    state: TrainState,
    step_fn: TrainStep,
    batches: Any,
    run: _Run,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None,
    signals: "_Signals",
    first_step: int,
    put_batch: Callable[[JaggedBatch], JaggedBatch],
) -> tuple[TrainState, str]:
    """The loop proper; returns the last state and why it ended."""
    config = run.config
    why = "patience" if run.out_of_patience else "done"
    step, iterator_state = first_step, batches.get_state()
    while step < config.num_steps and why == "done":
        state, metrics = step_fn(state, put_batch(next(batches)))
        step, iterator_state = step + 1, batches.get_state()
        run.pending.append((step, metrics))
        evaluating = evaluate is not None and config.eval_every and step % config.eval_every == 0
        saving = config.checkpoint_every and step % config.checkpoint_every == 0
        if step % config.log_every == 0 or evaluating or saving or signals.caught:
            try:
                run.fetch()
            except NonFiniteError:
                # Bad steps leave the weights alone, so this is the last good state.
                run.save(step, state, iterator_state)
                raise
        if evaluating and evaluate is not None:
            run.evaluated(step, evaluate(state))
            run.window_start = time.monotonic()
            if run.out_of_patience:
                why = "patience"
        if signals.caught:
            why = signals.caught
        if evaluating or saving:
            run.save(step, state, iterator_state)
    run.fetch()
    if run.saved_step != step and step > first_step:
        run.save(step, state, iterator_state)
    if signals.caught:
        run.progress.note(f"{why}: stopped after step {step}; run again to go on")
    return state, why


class _Signals:
    """Turns the first SIGINT or SIGTERM into a wish to stop; the second one acts as usual."""

    def __init__(self):
        self.caught: str = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: Any) -> None:
        self.caught = signal.Signals(number).name
        signal.signal(number, self._previous.get(number, signal.SIG_DFL))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
