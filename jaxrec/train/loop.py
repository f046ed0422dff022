"""The training loop: steps, guard, evaluation, early stop, checkpoints, exact resume."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrec.distributed.agreement import Agreement
from jaxrec.train.checkpoint import CheckpointStore
from jaxrec.train.checkpoint_errors import CheckpointError, CheckpointWarning
from jaxrec.train.progress import Log, Progress, make_log, make_progress
from jaxrec.train.signals import StopSignals
from jaxrec.train.step import StepMetrics, TrainState
from jaxrec.train.utilisation import TrainingFlops, speed_figures

type LoopState = Any
"""A `TrainState`, or what steps over many devices carry: with a `step` as soon as it is settled."""
type LoopStep = Callable[[LoopState, Any], tuple[LoopState, StepMetrics]]
type Evaluate = Callable[[LoopState], Mapping[str, float]]
type Evaluation = dict[str, float | int]

MAY_DIFFER = (
    "loop",
    "train.num_epochs",
    "train.eval_every",
    "train.checkpoint_every",
    "train.patience",
    "train.keep",
)
"""Settings that change no weight, only when to look, save and stop: they may differ on resuming."""

RUN_AHEAD = 8
"""Steps the host may be ahead of the devices: enough to hide it, few enough to bound the batches
that wait, and below the 32 programs with collectives at which several CPU devices deadlock."""


class NonFiniteError(FloatingPointError):
    """Training met NaN or infinity; the message names step and parameter."""


class LastSaveError(CheckpointError):
    """Training ended well, but its last checkpoint could not be written.

    Attributes:
      result: what `run_loop` would have returned.
    """

    def __init__(self, message: str, result: "LoopResult"):
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class LoopConfig:
    """When the loop does what; all in steps.

    Attributes:
      num_steps: of the whole run, earlier calls included.
      eval_every: evaluates, and after it saves a checkpoint; 0 never evaluates.
      checkpoint_every: saves in between; 0 saves only after evaluations and at the end.
      log_every: steps between lines of the log; device results are fetched only then.
      patience: evaluations without a better `monitor` before it stops; 0 never stops early.
      monitor: the metric that decides which step is the best; larger is better.
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
        for name in ("num_steps", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("eval_every", "checkpoint_every", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")


class LoopResult(NamedTuple):
    """What `run_loop` returns.

    Attributes:
      state: after the last step.
      best_state: at the best evaluation; the last one if none was made.
      history: the metrics of every evaluation, with their `step`.
      best_step: the step of `best_state`; None if no evaluation was made.
      stopped_because: "done", "patience", "out of batches" or the name of the signal.
    """

    state: TrainState
    best_state: TrainState
    history: list[Evaluation]
    best_step: int | None
    stopped_because: str


def run_loop(
    state: LoopState,
    step_fn: LoopStep,
    batches: Any,
    *,
    config: LoopConfig,
    folder: str | Path,
    model_config: Mapping[str, Any],
    evaluate: Evaluate | None = None,
    resume: bool = True,
    param_names: Sequence[str],
    put_batch: Callable[[Any], Any] = lambda batch: batch,
    progress: Progress | None = None,
    flops: TrainingFlops | None = None,
    settled: Callable[[Any], Any] = lambda state: state,
) -> LoopResult:
    """Trains until `num_steps`, early stop or a signal; called again, it goes on from there.

    A resumed run ends bit-identical to one that was never stopped, as long as machine, versions
    and configuration are the same. `config` may differ: it changes no weight.

    Several processes call it alike, with steps that all of them take part in. Only the first
    writes logs and shows progress. A signal to one of them stops all after the same step, at most
    two times `log_every` steps later.

    Args:
      state: the first state; donated.
      step_fn: from `make_step`.
      batches: an iterator of batches with `get_state()` and `set_state()`.
      folder: of the run; see `CheckpointStore`. `log.jsonl` and `tensorboard/` are written there.
      model_config: stored with every checkpoint and compared on resume.
      evaluate: metrics of a state; larger `monitor` is better.
      resume: False refuses a folder that holds checkpoints.
      param_names: name of every leaf of `state.params`, for errors.
      put_batch: places a batch on the devices.
      progress: None shows a bar on a terminal and prints lines elsewhere; `Progress()` is quiet.
        It is told of every shape of batches that the step was compiled for.
      flops: of the model, so that the progress line shows what of the device's peak is used.
      settled: completes what a step left under way; done before a state is evaluated, saved or
        returned. The step goes on from what it returns.

    Raises:
      NonFiniteError: NaN or infinity; the last good weights are saved first.
      LastSaveError: the last checkpoint could not be written; it holds the result.
      CheckpointError: the folder is in use, or holds no usable checkpoint.
      ConfigMismatch: the folder holds a run with another configuration.
    """
    full_config = {**model_config, "loop": asdict(config)}
    with CheckpointStore(folder, keep=config.keep, best_metric=config.monitor) as store:
        run = _Run(store, config, full_config, batches, param_names, flops, settled)
        state = run.resume(state, allowed=resume)
        run.log = make_log(store.folder, run.step)
        run.progress = make_progress(run.step, config.num_steps) if progress is None else progress
        try:
            if run.step:
                run.progress.note(f"resuming after step {run.step}")
            with StopSignals() as signals:
                state, why = run.train(state, step_fn, put_batch, evaluate, signals)
            return run.finish(state, why)
        finally:
            run.progress.close()
            run.log.close()


_now = time.monotonic


class _Run:
    """One call of `run_loop`: where it is, and what it has to write down."""

    log: Log
    progress: Progress

    def __init__(
        self,
        store: CheckpointStore,
        config: LoopConfig,
        full_config: Mapping[str, Any],
        batches: Any,
        param_names: Sequence[str],
        flops: TrainingFlops | None,
        settled: Callable[[Any], Any],
    ):
        self.store, self.config, self.full_config = store, config, full_config
        self.settled = settled
        self.batches, self.param_names, self.flops = batches, param_names, flops
        self.step, self.saved_step = 0, -1
        self.history: list[Evaluation] = []
        # Step metrics on their way from the device, then those waiting for the next log line.
        self.in_flight: list[tuple[int, StepMetrics]] = []
        self.window: list[dict[str, Any]] = []
        self.shapes: set[tuple[tuple[int, ...], ...]] = set()
        self.together = Agreement()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begins a new stretch of training to measure the speed of."""
        self.counts, self.clock = dict.fromkeys(("tokens", "pairs", "targets"), 0.0), _now()

    def resume(self, state: LoopState, *, allowed: bool) -> LoopState:
        """The newest checkpoint's state, or `state` in an empty folder."""
        if self.store.steps:
            if not allowed:
                raise CheckpointError(
                    f"{self.store.folder} already holds a run (steps {self.store.steps}); resume "
                    "it, or give another folder"
                )
            restored = self.store.restore(state, config=self.full_config, may_differ=MAY_DIFFER)
            state = restored.state
            self.batches.set_state(restored.iterator_state)
            self.history = restored.progress["history"]
            self.window = restored.progress["window"]
            self.saved_step = restored.step
        self.step = int(state.step)
        return state

    def train(
        self,
        state: LoopState,
        step_fn: LoopStep,
        put_batch: Callable[[Any], Any],
        evaluate: Evaluate | None,
        signals: StopSignals,
    ) -> tuple[LoopState, str]:
        """The loop proper; returns the last state and why it ended."""
        config = self.config
        why = "patience" if self.out_of_patience else ""
        self.restart_clock()
        while not why:
            if self.step >= config.num_steps:
                why = "done"
                break
            batch = next(self.batches, None)
            if batch is None:
                why = "out of batches"
                break
            state, metrics = self.run_step(step_fn, state, put_batch(batch))
            self.step += 1
            self.in_flight.append((self.step, metrics))
            if len(self.in_flight) > RUN_AHEAD:
                jax.block_until_ready(self.in_flight[-RUN_AHEAD - 1][1].loss)
            logging = self.due(config.log_every)
            evaluating = evaluate is not None and self.due(config.eval_every)
            saving = evaluating or self.due(config.checkpoint_every)
            if logging or saving or signals.caught:
                self.check(state)
            if logging:
                self.write_window()
            if saving:
                state = self.settled(state)
            if evaluating and evaluate is not None:
                self.record(evaluate(state))
                why = "patience" if self.out_of_patience else ""
            why = signals.stop_after(self.step, checked=logging or saving) or why
            if saving:
                self.save(state)
        self.check(state)
        if why in ("done", "out of batches"):
            self.write_window()
        return self.settled(state), why

    def run_step(
        self, step_fn: LoopStep, state: LoopState, batch: Any
    ) -> tuple[LoopState, StepMetrics]:
        """One step; where its batch has a new shape, tells how long compiling took."""
        shape = tuple(part.shape for part in jax.tree.leaves(batch))
        if shape in self.shapes:
            return step_fn(state, batch)
        self.shapes.add(shape)
        self.check(state)  # what ran before does not count towards the speed of what follows
        started = _now()
        state, metrics = step_fn(state, batch)
        self.progress.note(
            f"step {self.step + 1}: program {len(self.shapes)}, for batches of "
            f"{batch.item_ids.size:,} token slots, ready after {_now() - started:.1f} s"
        )
        self.restart_clock()
        return state, metrics

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is due now; 0 is never."""
        return every > 0 and self.step % every == 0

    def check(self, state: LoopState) -> None:
        """Fetches the step metrics that are in flight; saves and raises if one is not finite."""
        steps = [step for step, _ in self.in_flight]
        fetched = jax.device_get([metrics for _, metrics in self.in_flight])
        self.in_flight = []
        for step, metrics in zip(steps, fetched, strict=True):
            if metrics.nonfinite >= 0:
                self.save(self.settled(state))
                raise NonFiniteError(self._nonfinite_message(step, metrics))
            for name in self.counts:
                self.counts[name] += float(getattr(metrics, f"num_{name}"))
            self.window.append(
                {
                    "loss": float(metrics.loss),
                    "grad_norm": float(metrics.grad_norm),
                    "learning_rate": float(metrics.learning_rate),
                    **router_figures(metrics),
                }
            )

    def _nonfinite_message(self, step: int, metrics: StepMetrics) -> str:
        number = int(metrics.nonfinite)
        what = "the loss"
        if number < len(self.param_names):
            what = f"the gradient or the new value of {self.param_names[number]!r}"
        broken = [n for n, (_, stats) in enumerate(metrics.routers) if stats.nonfinite]
        if broken:
            what = f"the logits of router {broken[0]} (from 0, in the model's order), so {what}"
        return (
            f"step {step}: {what} is not finite (loss {float(metrics.loss):g}, gradient norm "
            f"{float(metrics.grad_norm):g}). The step was not applied; the weights are saved in "
            f"{self.store.folder} as of step {self.step}. Lower the learning rate, clip "
            "gradients, or look at the batch."
        )

    def write_window(self) -> None:
        """A log line with the means of the steps since the one before."""
        if not self.window:
            return
        last = self.window[-1]
        figures = {
            name: np.mean([step[name] for step in self.window], axis=0).tolist() for name in last
        }
        figures["learning_rate"] = last["learning_rate"]
        self.window = []
        self.log.write(self.step, "train", figures)
        speed = {}
        if self.counts["tokens"]:  # none where an evaluation has just begun a new stretch
            speed = speed_figures(_now() - self.clock, **self.counts, flops=self.flops)
        self.restart_clock()
        self.progress.update(self.step, {"loss": figures["loss"], **speed})

    def record(self, metrics: Mapping[str, float]) -> None:
        """Notes an evaluation, and starts the clock of the token rate again."""
        monitor = self.config.monitor
        if monitor not in metrics:
            raise ValueError(f"monitor {monitor!r} is not among the metrics {sorted(metrics)}")
        figures = {name: float(value) for name, value in metrics.items()}
        metrics = self.together.from_first("evaluated", lambda: figures)  # all decide alike
        if math.isnan(metrics[monitor]):
            raise NonFiniteError(f"step {self.step}: the evaluation's {monitor!r} is NaN")
        self.history.append({"step": self.step, **metrics})
        self.log.write(self.step, "eval", metrics)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.progress.note(f"step {self.step}: {shown}")
        self.restart_clock()

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the largest monitored metric, the first of equals."""
        scored = [entry for entry in self.history if self.config.monitor in entry]
        return max(scored, key=lambda entry: entry[self.config.monitor]) if scored else None

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        if not self.config.patience or self.best is None:
            return False
        since_best = len(self.history) - 1 - self.history.index(self.best)
        return since_best >= self.config.patience

    def save(self, state: LoopState) -> None:
        """Starts a checkpoint; a failure is a warning here, as training itself is unharmed."""
        try:
            self._start_saving(state)
        except CheckpointError as error:
            warnings.warn(str(error), CheckpointWarning, stacklevel=2)

    def _start_saving(self, state: LoopState) -> None:
        if self.saved_step == self.step:
            return
        newest = self.history[-1] if self.history else {"step": -1}
        metrics = {name: value for name, value in newest.items() if name != "step"}
        self.store.save(
            self.step,
            state,
            iterator_state=self.batches.get_state(),
            config=self.full_config,
            metrics=metrics if newest["step"] == self.step else None,
            progress={"history": self.history, "window": self.window},
        )
        self.saved_step = self.step

    def finish(self, state: LoopState, why: str) -> LoopResult:
        """Makes sure that the last step is saved, and fetches the best."""
        failure = self._save_last(state)
        best_state = self._best_state(state)
        best_step = int(best_state.step) if self.best is not None else None
        result = LoopResult(state, best_state, self.history, best_step, why)
        if failure is not None:
            raise LastSaveError(
                f"training ended after step {self.step} ({why}), but {failure} The result is kept "
                "in this error's `result`; running again repeats the steps since the last "
                "checkpoint.",
                result,
            ) from failure
        if why.startswith("SIG"):
            self.progress.note(f"{why}: stopped after step {self.step}; run again to go on")
        return result

    def _save_last(self, state: LoopState) -> CheckpointError | None:
        """Completes the last checkpoint, trying once more where the first attempt failed."""
        try:
            self._start_saving(state)
            self.store.wait()
        except CheckpointError:
            self.saved_step = -1
            try:
                self._start_saving(state)
                self.store.wait()
            except CheckpointError as error:
                return error
        return None

    def _best_state(self, state: LoopState) -> LoopState:
        if self.best is None or self.best["step"] == self.step:
            return state
        try:
            return self.store.restore(state, step=int(self.best["step"])).state
        except CheckpointError as error:
            warnings.warn(
                f"the best step {self.best['step']} cannot be restored, so the last state stands "
                f"in for it: {error}",
                CheckpointWarning,
                stacklevel=3,
            )
            return state


def router_figures(metrics: StepMetrics) -> dict[str, float | list[float]]:
    """Figures of a step's routers for the log, those of the n-th under `router/n/`.

    `loss` is weighted as it enters the training loss; `load` each expert's share of the pairs,
    `max_over_mean` the largest share over the mean; `entropy` of a token's probabilities, in nats;
    `dead_experts` had no token; `dropped` pairs exceeded the capacity.
    """
    figures: dict[str, float | list[float]] = {}
    for number, (loss, stats) in enumerate(metrics.routers):
        load = np.asarray(stats.load, np.float64)
        own = {
            "loss": float(loss),
            "load": (load / max(load.sum(), 1)).tolist(),
            "max_over_mean": float(stats.max_over_mean),
            "entropy": float(stats.entropy),
            "dead_experts": float(stats.dead_experts),
            "dropped": float(stats.dropped),
        }
        figures |= {f"router/{number}/{name}": value for name, value in own.items()}
    return figures
