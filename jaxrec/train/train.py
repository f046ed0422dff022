"""Training a model on a split from start to finish: batches, step, loop, evaluation."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrec.data import (
    EvalSet,
    PopularitySampler,
    PrefetchIterator,
    SampleMode,
    Split,
    TrainingBatches,
    bucket_sizes,
    cut_to_bucket,
    item_counts,
    training_batches,
)
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.train.evaluate import evaluate_ranking, make_rank_fn
from jaxrec.train.loop import LastSaveError, LoopConfig, LoopResult, run_loop
from jaxrec.train.objective import LossConfig, Sampler
from jaxrec.train.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxrec.train.parallel import ParallelConfig, ParallelRun
from jaxrec.train.progress import Progress
from jaxrec.train.step import (
    TrainState,
    init_state,
    make_step,
    parameter_names,
)
from jaxrec.train.utilisation import training_flops


@dataclass(frozen=True)
class TrainConfig:
    """How a sequence model is trained.

    Attributes:
      sampling: "sequences" (the last max_len events of each, a target at every position),
        "windows" (all events of longer sequences, in several samples) or "prefixes" (one sample a
        prefix).
      token_budget: token slots of a batch.
      max_sequences: sequences of a batch at most.
      token_buckets: batches are cut to the first of so many sizes that holds their tokens:
        token_budget, its half, its quarter …; a program is compiled for each that occurs. None is
        1: all batches have one size.
      ema_decay: None trains without averaged weights; otherwise they are what is evaluated.
      loss: which loss.
      optimizer: Adam and its schedule.
      num_epochs: passes over the data, unless early stopping ends before.
      eval_every: epochs between evaluations on the validation set.
      eval_users: validation users looked at (evenly spread); None looks at all.
      checkpoint_every: steps between checkpoints besides those after evaluations; 0 for none.
      patience: evaluations without a better `monitor` before training stops; 0 never stops.
      monitor: the metric that decides; larger is better.
      keep: newest checkpoints kept, besides the best.
      seed: of the order of samples, dropout and negatives; the model has its own.
    """

    sampling: SampleMode = "sequences"
    token_budget: int = 1024
    max_sequences: int = 256
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float | None = None
    num_epochs: int = 50
    eval_every: int = 1
    eval_users: int | None = None
    checkpoint_every: int = 0
    patience: int = 5
    monitor: str = "ndcg@10"
    keep: int = 2
    seed: int = 0
    token_buckets: int | None = None

    def __post_init__(self):
        if self.token_buckets is not None and self.token_buckets < 1:
            raise ValueError(f"token_buckets is {self.token_buckets}; expected None or at least 1")
        for name in ("num_epochs", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.eval_users is not None and self.eval_users < 1:
            raise ValueError(f"eval_users is {self.eval_users}; expected None or at least 1")


def train(
    model: Any,
    split: Split,
    *,
    config: TrainConfig,
    folder: str | Path,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    parallel: ParallelConfig | None = None,
    mesh: Mesh | None = None,
) -> LoopResult:
    """Trains `model` on `split.train`, choosing the best step on `split.valid`.

    Run again with the same folder, it goes on where it was stopped, to the bit; over a mesh also
    on another number of devices or processes, with the same global batches.

    Args:
      model: an NNX module with `config` (a dataclass with `max_len`), `encode(batch, key=)` and
        `item_embeddings()`, such as `SASRec` or `HSTU`; with an `overarch` as well (see
        `jaxrec.nn.TwoStage`) both are trained together.
      split: from `leave_one_out` or `time_split`.
      config: compared with that of the checkpoints when resuming, but for `num_epochs`,
        `eval_every`, `checkpoint_every`, `patience` and `keep`.
      folder: where checkpoints, logs and the lock are kept.
      evaluate: replaces the ranking metrics on the validation set.
      resume: False refuses a folder that already holds a run.
      progress: as for `run_loop`.
      parallel: trains over the devices of `mesh`, item rows split over them; of several processes
        all call this alike, with the same model and one folder that all see.
      mesh: given with `parallel` and only then.

    Returns:
      The last and the best state, as one device has them, and the history of metrics.

    Raises:
      ValueError: the model knows fewer items than the data have; a configuration that is not
        trained over many devices (see `ParallelRun`); else as `run_loop`.
    """
    _check_vocabulary(model, split)
    _check_parallel(config, parallel, mesh)
    batches = training_batches(
        split.train,
        mode=config.sampling,
        max_len=model.config.max_len,
        token_budget=config.token_budget,
        max_sequences=config.max_sequences,
        seed=config.seed,
    )
    evaluate = evaluate or validation_metrics(model, spread(split.valid, config.eval_users))
    options: dict[str, Any] = {
        "folder": folder,
        "resume": resume,
        "progress": progress,
        "flops": training_flops(model.config, config.loss, split.train.num_items),
    }
    if parallel is not None and mesh is not None:
        return _train_parallel(model, split, batches, config, evaluate, options, parallel, mesh)
    optimizer = make_optimizer(config.optimizer)
    state = init_state(model, optimizer, seed=config.seed, ema_decay=config.ema_decay)
    step = make_step(
        model,
        optimizer,
        loss=config.loss,
        schedule=make_schedule(config.optimizer),
        ema_decay=config.ema_decay,
        sampler=_sampler(config.loss.negatives, split),
        overarch_sampler=config.loss.overarch and _sampler(config.loss.overarch.negatives, split),
    )
    sizes = bucket_sizes(config.token_budget, config.token_buckets or 1)

    def place(batch: JaggedBatch) -> JaggedBatch:
        return jax.device_put(cut_to_bucket(batch, sizes))

    with closing(PrefetchIterator(iter(batches), 2, place=place)) as iterator:
        return run_loop(
            state,
            step,
            iterator,
            config=_loop_config(config, batches.num_batches_per_epoch),
            model_config=run_config(model, config),
            evaluate=evaluate,
            param_names=parameter_names(state.params),
            **options,
        )


def _train_parallel(
    model: Any,
    split: Split,
    batches: TrainingBatches,
    config: TrainConfig,
    evaluate: Callable[[TrainState], dict[str, float]],
    options: dict[str, Any],
    parallel: ParallelConfig,
    mesh: Mesh,
) -> LoopResult:
    """`train` over the devices of a mesh."""
    run = ParallelRun(
        model,
        batches,
        make_optimizer(config.optimizer),
        loss=config.loss,
        sampler=_sampler(config.loss.negatives, split),
        schedule=make_schedule(config.optimizer),
        seed=config.seed,
        config=parallel,
        mesh=mesh,
    )

    def as_one_device_has(result: LoopResult) -> LoopResult:
        last: Any = result.state
        best: Any = result.best_state
        gathered = run.gathered(last)
        found = gathered if best is last else run.gathered(best)
        return result._replace(state=gathered, best_state=found)

    global_batches = -(-batches.num_batches_per_epoch // parallel.num_sources)
    with closing(run.batches) as iterator:
        try:
            result = run_loop(
                run.state,
                run.step,
                iterator,
                config=_loop_config(config, global_batches),
                model_config={**run_config(model, config), "parallel": asdict(parallel)},
                evaluate=lambda state: evaluate(run.gathered(state)),
                param_names=run.param_names,
                settled=run.settled,
                **options,
            )
        except LastSaveError as error:
            raise LastSaveError(str(error), as_one_device_has(error.result)) from error
    return as_one_device_has(result)


def _loop_config(config: TrainConfig, steps_per_epoch: int) -> LoopConfig:
    return LoopConfig(
        num_steps=config.num_epochs * steps_per_epoch,
        eval_every=config.eval_every * steps_per_epoch,
        checkpoint_every=config.checkpoint_every,
        patience=config.patience,
        monitor=config.monitor,
        keep=config.keep,
    )


def _check_parallel(
    config: TrainConfig, parallel: ParallelConfig | None, mesh: Mesh | None
) -> None:
    if (parallel is None) != (mesh is None):
        raise ValueError(
            "training over many devices needs both parallel=ParallelConfig(...) and "
            'mesh=make_mesh({"data": 8}); on one device neither is given'
        )
    if parallel is None:
        return
    if config.ema_decay is not None:
        raise ValueError(
            f"ema_decay={config.ema_decay} averages every item row in every step, which split rows "
            "avoid; train over many devices with ema_decay=None"
        )
    if (config.token_buckets or 1) > 1:
        raise ValueError(
            "token_buckets gives batches several sizes, but devices that train together need one; "
            "use token_buckets=None, and ParallelConfig(balance=...) against uneven batches"
        )


def _sampler(negatives: str, split: Split) -> Sampler | None:
    if negatives == "popularity":
        return PopularitySampler.from_counts(item_counts(split.train))
    return None


def _check_vocabulary(model: Any, split: Split) -> None:
    rows = model.item_embeddings().shape[0]
    if rows <= split.train.num_items:
        raise ValueError(
            f"the model has {rows - 1} items, the data {split.train.num_items}: higher numbers "
            "would silently read another row. Build the model with the data's num_items."
        )


def run_config(model: Any, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint records, and what resuming compares."""
    return {
        "model": {"name": type(model).__name__, **asdict(model.config)},
        "train": asdict(config),
    }


def validation_metrics(model: Any, eval_set: EvalSet) -> Callable[[TrainState], dict[str, float]]:
    """Ranking metrics of a state's averaged weights (or of its weights) on `eval_set`."""
    rank_fn = make_rank_fn(model)

    def evaluate(state: TrainState) -> dict[str, float]:
        return evaluate_ranking(rank_fn, state.eval_params, eval_set, max_len=model.config.max_len)

    return evaluate


def spread(eval_set: EvalSet, num_users: int | None) -> EvalSet:
    """At most `num_users` of the questions, evenly spread."""
    if num_users is None or num_users >= len(eval_set):
        return eval_set
    rows = np.linspace(0, len(eval_set) - 1, num_users).astype(np.int64)
    histories = eval_set.histories.take(rows, eval_set.histories.lengths[rows])
    users = None if eval_set.user_index is None else eval_set.user_index[rows]
    return EvalSet(histories, eval_set.targets[rows], users)
