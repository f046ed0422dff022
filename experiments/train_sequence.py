"""Trains a published setting, over several seeds, and records what it reached.

    python -m experiments.train_sequence beauty-hstu
    python -m experiments.train_sequence beauty-best --seeds 0 1 2
    python -m experiments.train_sequence --list
    srun python -m experiments.train_sequence beauty-hstu --distributed

Every seed has a folder of its own under `--folder`; stopped (exit code 75), the same command goes
on. On two CPU cores an epoch of Beauty takes about 6 s; the results say how long whole runs took.
"""

import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments import record, report
from experiments.settings import find, names
from experiments.settings.base import Setting, build_model, load_split
from jaxrec.data import Dataset, Split, item_counts
from jaxrec.distributed import EXIT_PREEMPTED, BalanceConfig, LaunchConfig, launch
from jaxrec.ops.metrics import ranking_metrics
from jaxrec.sharding import make_mesh
from jaxrec.train import (
    LossConfig,
    ParallelConfig,
    evaluate_ranking,
    make_rank_fn,
    popularity_ranks,
    read_log,
    run_config,
    train,
    use_compile_cache,
)

ROUTER_FIGURES = ("load", "max_over_mean", "entropy", "dead_experts")
ROUTER_POINTS = 100  # of each recorded series, each the mean of as many log lines
METRICS = ("hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")


@dataclass(frozen=True)
class TrainSequence:
    """What to run.

    Attributes:
      setting: its name; see `--list`.
      data: the dataset folder, if it is not where the setting expects it.
      folder: where runs are kept.
      num_epochs: instead of the setting's, for a quick look.
      results: where the result is recorded.
      scratch: records the result of a source tree with uncommitted changes, marked as such.
      list: prints the names of the settings.
      distributed: trains over all devices of the processes that were started together; the first
        one prints and records.
      sources: of a distributed run; each gives a part of the setting's batch. A multiple of the
        devices, also of those that the run may move to.
      launch: how the processes find each other; from Slurm, MPI or Kubernetes by itself.
    """

    setting: tyro.conf.Positional[str] = ""
    seeds: tuple[int, ...] = (0,)
    data: Path | None = None
    folder: Path = Path("runs")
    results: Path = record.RESULTS
    num_epochs: int | None = None
    scratch: bool = False
    list: Annotated[bool, tyro.conf.arg(name="list")] = False
    distributed: bool = False
    sources: int = 8
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def over_devices(setting: Setting, sources: int) -> Setting:
    """The setting as many devices train it: the same items and tokens in a batch of all sources.

    Averaged weights and the full softmax, for which every device would need every row in every
    step, are left out: the softmax is sampled.
    """
    whole = setting.train
    loss = whole.loss
    if loss.name == "full":
        loss = LossConfig("sampled", num_negatives=512, negatives="popularity")
    if whole.token_budget // sources < setting.model.max_len:
        raise ValueError(
            f"a batch of {whole.token_budget} tokens in {sources} sources leaves less than a "
            f"sequence of {setting.model.max_len} to each; choose fewer --sources"
        )
    optimizer = replace(whole.optimizer, rows=whole.optimizer.rows or "adam")
    part = replace(
        whole,
        loss=loss,
        optimizer=optimizer,
        token_budget=whole.token_budget // sources,
        max_sequences=max(1, whole.max_sequences // sources),
        token_buckets=None,
        ema_decay=None,
    )
    return replace(setting, train=part)


def run_seed(
    setting: Setting,
    dataset: Dataset,
    split: Split,
    folder: Path,
    seed: int,
    parallel: dict[str, Any],
) -> dict[str, float]:
    """Trains one seed and evaluates its best step on the test users."""
    model = build_model(setting, dataset, split, seed=seed)
    config = replace(setting.train, seed=seed)
    before, started = _minutes_before(folder), time.monotonic()
    _note_minutes(folder, None)  # stays, should this start be killed
    result = train(model, split, config=config, folder=folder, **parallel)
    minutes = None if before is None else before + (time.monotonic() - started) / 60
    _note_minutes(folder, minutes)
    if result.stopped_because.startswith("SIG"):
        print(f"stopped by {result.stopped_because}; the same command goes on", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    metrics = evaluate_ranking(
        make_rank_fn(model), result.best_state.eval_params, split.test, max_len=model.config.max_len
    )
    best = next(h for h in result.history if h["step"] == result.best_step)
    figures = {**metrics, **{f"valid {name}": best[name] for name in METRICS}}
    figures["best_step"] = float(result.best_step or 0)
    if minutes is not None:  # the minutes of a part would mislead
        figures["minutes"] = minutes
        figures["minutes an epoch"] = minutes / len(result.history)
    return figures


def _minutes_before(folder: Path) -> float | None:
    """Minutes of a run's earlier starts; None where one of them was killed."""
    if not (folder / "checkpoints").exists():
        return 0.0
    file = folder / "minutes.json"
    return record.read_json(file) if file.exists() else None


def _note_minutes(folder: Path, minutes: float | None) -> None:
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        record.write_json(folder / "minutes.json", minutes)


def measurements(runs: list[dict[str, float]], setting: str) -> list[dict[str, Any]]:
    """Every figure with its samples (one a seed), mean and spread."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run):
        samples = [run[name] for run in runs if name in run]
        unit = {"minutes": "min", "minutes an epoch": "min", "best_step": "steps"}.get(name, "1")
        rows.append(
            {
                "metric": name,
                "unit": unit,
                "workload": setting,
                "samples": samples,
                "value": float(np.mean(samples)),
                "spread": float(np.std(samples, ddof=1)) if len(samples) > 1 else 0.0,
            }
        )
    return rows


def router_series(folder: Path, setting: str, seed: int) -> list[dict[str, Any]]:
    """How evenly each router used its experts over the steps of a run; nothing without experts."""
    lines = read_log(folder, "train")
    names = [name for name in lines[-1] if name.split("/")[-1] in ROUTER_FIGURES] if lines else []
    parts = np.array_split(np.arange(len(lines)), min(ROUTER_POINTS, len(lines) or 1))
    series = []
    for name in names:
        values = [np.mean([lines[i][name] for i in part], axis=0) for part in parts]
        series.append(
            {
                "metric": name,
                "unit": "nats" if name.endswith("entropy") else "1",
                "workload": setting,
                "seed": seed,
                "steps": [lines[part[-1]]["step"] for part in parts],
                "samples": np.round(values, 5).tolist(),
            }
        )
    return series


def plot_routers(path: Path, series: list[dict[str, Any]]) -> None:
    """Draws the first seed's series beside the result: shares of the load, and the largest one."""
    shares, largest = {}, {}
    for row in series:
        _, number, figure = row["metric"].split("/")
        drawn = {"load": shares, "max_over_mean": largest}.get(figure)
        if drawn is not None and row["seed"] == series[0]["seed"]:
            drawn[f"block {number}"] = (row["steps"], row["samples"])
    path.with_suffix(".load.png").write_bytes(
        report.stacked(shares, x="step", y="share of the load, by expert")
    )
    path.with_suffix(".balance.png").write_bytes(
        report.plot(largest, x="step", y="largest load / mean", lines={"even": 1.0}, bottom=0.0)
    )


def show(config: TrainSequence, setting: Setting, runs: list[dict[str, float]]) -> None:
    """Ours beside what others published."""
    rows = [
        {
            "model": f"{config.setting}, seed {seed}",
            "hr@10": run["hr@10"],
            "ndcg@10": run["ndcg@10"],
        }
        for seed, run in zip(config.seeds, runs, strict=True)
    ]
    rows += [{"model": p.source, "hr@10": p.hr10, "ndcg@10": p.ndcg10} for p in setting.published]
    report.print_table("Test, full ranking, history filtered", rows)


def main(config: TrainSequence) -> None:
    """Trains all seeds, records and shows them."""
    if config.list or not config.setting:
        print("\n".join(names()))
    elif config.distributed:
        with launch(config.launch) as launched:
            if launched.is_first:
                told = f"{launched.num_processes} processes, told by {launched.found}"
                print(f"{told}; {jax.device_count()} devices")
            parallel = ParallelConfig(config.sources, balance=BalanceConfig(), prioritized=True)
            mesh = make_mesh({parallel.axis: jax.device_count()})
            setting = over_devices(find(config.setting), config.sources)
            run(config, setting, {"parallel": parallel, "mesh": mesh}, recording=launched.is_first)
    else:
        run(config, find(config.setting), {}, recording=True)


def run(
    config: TrainSequence, setting: Setting, parallel: dict[str, Any], *, recording: bool
) -> None:
    """Trains all seeds; records and shows them, if this process is to."""
    use_compile_cache(config.folder / "compiled")
    if config.num_epochs is not None:
        setting = replace(setting, train=replace(setting.train, num_epochs=config.num_epochs))
    dataset, split = load_split(config.data or setting.data, min_count=setting.min_count)
    if recording:
        print(f"{config.setting}: {len(split.train):,} users, {split.train.num_items:,} items")
    started = time.monotonic()
    name = f"{config.setting}-distributed" if parallel else config.setting
    folders = {seed: config.folder / name / f"seed-{seed}" for seed in config.seeds}
    runs = [
        run_seed(setting, dataset, split, folders[seed], seed, parallel) for seed in config.seeds
    ]
    if not recording:
        return
    moe = setting.model.moe
    routed = config.seeds if moe is not None and moe.num_experts > 1 else ()
    routers = [row for seed in routed for row in router_series(folders[seed], name, seed)]
    popular = ranking_metrics(popularity_ranks(item_counts(split.train), split.test))
    model = build_model(setting, dataset, split, seed=0)
    over = {}
    if parallel:
        over = {"processes": jax.process_count(), "parallel": asdict(parallel["parallel"])}
    path = record.write(
        "train_sequence",
        config={"setting": name, **run_config(model, setting.train)} | over,
        measurements=measurements(runs, name) + routers,
        checks={"popularity hr@10": popular["hr@10"], "popularity ndcg@10": popular["ndcg@10"]},
        seeds=config.seeds,
        data=record.describe_data((config.data or setting.data).name, *dataset.files),
        published=[str(figure) for figure in setting.published],
        wall_s=time.monotonic() - started,
        scratch=config.scratch,
        folder=config.results,
    )
    if routers:
        plot_routers(path, routers)
    show(config, setting, runs)
    print(f"recorded in {path}")


if __name__ == "__main__":
    main(tyro.cli(TrainSequence))
