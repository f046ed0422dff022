"""Re-ranks what a dot product retrieves: Mixture of Logits, MLP and attention beside the dot.

    python -m experiments.train_sequence beauty-sasrec --seeds 0 1 2     # the towers, if not there
    python -m experiments.overarch beauty-sasrec --seeds 0 1 2

The towers stay as they were trained. An over-arch learns from events that the towers have not: the
validation item of some users, where it was retrieved at all (the towers fit their own training
events too closely to show where they err). The other users' validation items choose epoch and
weight; the test items are looked at once. Each candidate's value is a formula,
`dot + weight * overarch`, evaluated by a `ValueModel`. As a control, a popularity term is given the
same validation items.

Every question is also asked with a filter, one of its target's attributes, which the item index
evaluates while it searches.
A seed takes some minutes on one CPU core.
"""

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from experiments import readme, record, report
from experiments.settings import find
from experiments.settings.base import Setting, build_model, load_split
from jaxrec.data import EvalSet, ItemAttributes, eval_batches, item_counts
from jaxrec.functional import split_params
from jaxrec.nn import (
    AttentionOverArch,
    AttentionOverArchConfig,
    MixtureOfLogits,
    MixtureOfLogitsConfig,
    MLPOverArch,
    MLPOverArchConfig,
    ValueModel,
)
from jaxrec.ops.losses import scored_softmax_loss
from jaxrec.ops.metrics import candidate_scores, ranking_metrics, reranked, target_ranks
from jaxrec.retrieval import ItemIndex
from jaxrec.train import CheckpointStore, init_state, make_optimizer, with_params
from jaxrec.train.evaluate import history_matrix

CUTOFFS = (10, 100)
SHOWN = readme.OVERARCH_METRICS
DRAWN = ("hr@10", "hr@100", *readme.OVERARCH_FILTERED)
WEIGHTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
FORMULAS = {weight: f"dot + {weight} * overarch" for weight in WEIGHTS}


@dataclass(frozen=True)
class OverArchExperiment:
    """What to run.

    Attributes:
      setting: of the towers, as for `train_sequence`.
      data: the dataset folder, if it is not where the setting expects it.
      folder: where `train_sequence` kept its runs.
      overarchs: which to compare.
      candidates: K0, retrieved by dot product and re-ranked.
      listed: candidates beside the target in a training list.
      least_passing: items that pass a filter worth asking with.
      chooser_share: share of the validation users that choose instead of training.
      results: where the result is recorded; the plot goes beside it.
      scratch: records the result of a source tree with uncommitted changes, marked as such.
    """

    setting: tyro.conf.Positional[str] = "beauty-sasrec"
    seeds: tuple[int, ...] = (0,)
    data: Path | None = None
    folder: Path = Path("runs")
    overarchs: tuple[Literal["MoL", "MLP", "attention"], ...] = ("MoL", "MLP", "attention")
    candidates: int = 500
    listed: int = 100
    num_epochs: int = 8
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    least_passing: int = 200
    chooser_share: float = 0.25
    results: Path = record.RESULTS
    scratch: bool = False


class Questions(NamedTuple):
    """Users' queries, candidates by dot product (-inf: none), targets and their rank by it."""

    query: np.ndarray
    ids: np.ndarray
    dots: np.ndarray
    target: np.ndarray
    rank: np.ndarray

    def take(self, users: np.ndarray) -> "Questions":
        """The questions of some users."""
        return Questions(*[column[users] for column in self])


def over_arch(name: str, width: int, seed: int) -> Any:
    """The over-arch of that name; none holds the dot product, the formula adds it."""
    rngs, shared = nnx.Rngs(seed), {"residual": False, "scale": 0.1}
    if name == "MoL":
        config = MixtureOfLogitsConfig(
            width, query_components=4, item_components=4, component_width=16, gate_hidden=16,
            temperature=0.1, **shared,
        )  # fmt: skip
        return MixtureOfLogits(config, rngs=rngs)
    if name == "MLP":
        return MLPOverArch(MLPOverArchConfig(width, (64, 32), **shared), rngs=rngs)
    config = AttentionOverArchConfig(width, hidden=32, num_heads=2, **shared)
    return AttentionOverArch(config, rngs=rngs)


def load_towers(setting: Setting, model: Any, folder: Path) -> Any:
    """The best checkpoint of a `train_sequence` run, as a model."""
    state = init_state(
        model, make_optimizer(setting.train.optimizer), seed=0, ema_decay=setting.train.ema_decay
    )
    with CheckpointStore(folder, best_metric=setting.train.monitor) as store:
        return with_params(model, store.restore(state, step="best").state.eval_params)


def ask(model: Any, eval_set: EvalSet, num_candidates: int, *, block: int = 128) -> Questions:
    """Retrieves every user's candidates by dot product, their history left out."""
    table, width = model.item_embeddings(), model.item_embeddings().shape[1]
    query = np.zeros((len(eval_set), width), np.float32)
    encode = jax.jit(lambda batch: model.encode(batch)[batch.target_positions])
    batches = eval_batches(
        eval_set, max_len=model.config.max_len, batch_size=256, token_budget=256 * 20
    )
    for batch, users in batches:
        query[users[users >= 0]] = np.asarray(encode(batch))[users >= 0]

    @jax.jit
    def retrieve(query, target, history):
        dots, ids = jax.lax.top_k(candidate_scores(query, table, target, history), num_candidates)
        return ids, dots, target_ranks(query, table, target, history)

    parts = []
    for start in range(0, len(eval_set), block):
        users = np.arange(start, min(start + block, len(eval_set)))
        asked = np.pad(users, (0, block - len(users)), mode="edge")
        history, target = history_matrix(eval_set, asked), eval_set.targets[asked]
        found = [np.asarray(x)[: len(users)] for x in retrieve(query[asked], target, history)]
        parts.append(found)
    ids, dots, rank = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Questions(query, ids, dots, np.asarray(eval_set.targets), rank)


def target_filters(
    attributes: ItemAttributes, targets: np.ndarray, least: int, seed: int
) -> list[str | None]:
    """For each target one of its attributes that at least `least` items have; None without any."""
    rng = np.random.default_rng(seed)
    values = [
        {f'{feature}:"{value}"' for feature, rows in attributes.values.items() for value in rows[i]}
        for i in range(attributes.items.size + 1)
    ]
    passing = Counter(value for own in values for value in own)
    choices = [sorted(v for v in values[target] if passing[v] >= least) for target in targets]
    return [own[rng.integers(len(own))] if own else None for own in choices]


def ask_filtered(
    asked: Questions, index: ItemIndex, eval_set: EvalSet, filters: list[str | None],
    *, block: int = 256,
) -> Questions:  # fmt: skip
    """The questions that have a filter, with the candidates that the index finds to pass it."""
    users = np.flatnonzero([f is not None for f in filters])
    asked, filters = asked.take(users), [filters[user] for user in users]
    num_candidates, parts = min(asked.ids.shape[1], index.num_items), []
    for start in range(0, len(users), block):
        places = np.minimum(np.arange(start, start + block), len(users) - 1)
        found = index.search(
            asked.query[places], index.compile([filters[place] for place in places]),
            k=num_candidates, exclude=history_matrix(eval_set, users[places]),
        )  # fmt: skip
        count = min(block, len(users) - start)
        parts.append([np.asarray(x)[:count] for x in (found.ids, found.scores)])
    ids, dots = (np.concatenate(column) for column in zip(*parts, strict=True))
    is_target = ids == asked.target[:, None]
    rank = np.where(is_target.any(axis=1), is_target.argmax(axis=1), index.num_items)
    return asked._replace(ids=np.maximum(ids, 0), dots=dots, rank=rank)


def candidate_values(overarch: Any, params: Any, table: jax.Array, asked: Questions) -> np.ndarray:
    """The over-arch's scores of all candidates; -inf where there is none."""
    rebuild, _ = split_params(overarch)

    @jax.jit
    def score(params, components, query, ids, valid):
        rows = jax.tree.map(lambda column: column[ids], components)
        return rebuild(params)(query, rows, valid)

    components = jax.jit(lambda params: rebuild(params).item_components(table))(params)
    out, block = np.empty(asked.ids.shape, np.float32), 64
    for start in range(0, len(out), block):
        users = np.minimum(np.arange(start, start + block), len(out) - 1)
        part = asked.take(users)
        values = score(params, components, part.query, part.ids, part.dots > -np.inf)
        out[users] = np.asarray(values)
    return out


def metrics_of(values: np.ndarray, asked: Questions) -> dict[str, float]:
    """Ranking metrics once the candidates are ordered by `values`."""
    arrays = [jnp.asarray(x) for x in (values, asked.ids, asked.target, asked.rank)]
    return ranking_metrics(np.asarray(reranked(*arrays)), CUTOFFS)


def fit(
    overarch: Any, table: jax.Array, known: Questions, chooser: Questions,
    config: OverArchExperiment, seed: int,
) -> tuple[Any, float, dict[str, float]]:  # fmt: skip
    """(parameters, weight, chooser's metrics) of the epoch that served the chooser best."""
    rebuild, params = split_params(overarch)
    optimizer = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    opt_state = optimizer.init(params)

    def loss(params, query, dots, ids):
        """Softmax of the target (column 0) among its list, by dot + overarch."""
        model = rebuild(params)
        rows = jax.tree.map(lambda column: column[ids], model.item_components(table))
        valid = (dots > -jnp.inf) & (ids != ids[:, :1]).at[:, 0].set(True)
        scores = jnp.where(valid, dots + model(query, rows, valid), -1e30)
        return scored_softmax_loss(scores[:, 0], scores[:, 1:], ids[:, 0], ids[:, 1:])

    @jax.jit
    def step(params, opt_state, query, dots, ids):
        value, grads = jax.value_and_grad(loss)(params, query, dots, ids)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    rng, best = np.random.default_rng(seed), None
    target_dots = np.einsum("ud,ud->u", known.query, np.asarray(table)[known.target])
    for epoch in range(config.num_epochs):
        order, losses = rng.permutation(len(known.target)), []
        for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
            users = order[start : start + config.batch_size]
            columns = rng.choice(known.ids.shape[1], config.listed, replace=False)
            ids = np.concatenate([known.target[users, None], known.ids[users][:, columns]], 1)
            dots = np.concatenate([target_dots[users, None], known.dots[users][:, columns]], 1)
            params, opt_state, value = step(params, opt_state, known.query[users], dots, ids)
            losses.append(value)
        values = candidate_values(overarch, params, table, chooser)
        for weight in WEIGHTS:
            metrics = metrics_of(combined(weight, values, chooser), chooser)
            if best is None or metrics["ndcg@100"] > best[2]["ndcg@100"]:
                best = (params, weight, metrics)
        assert best is not None
        print(
            f"  epoch {epoch + 1}: loss {np.mean(losses):.4f}, best so far {shown(best[2])}",
            flush=True,
        )
    assert best is not None
    return best


def combined(weight: float, values: np.ndarray, asked: Questions) -> np.ndarray:
    """dot + weight · overarch for every candidate, by the value model."""
    model = ValueModel(FORMULAS[weight], tasks=("dot", "overarch"))
    scores = {"dot": jnp.asarray(asked.dots), "overarch": jnp.asarray(values)}
    return np.asarray(model(scores, valid=jnp.asarray(asked.dots > -np.inf)))


def popularity_term(log_counts: np.ndarray, known: Questions) -> float:
    """The weight of log(1 + count) beside the dot product that serves the known users best."""

    def quality(weight: float) -> float:
        return metrics_of(known.dots + weight * log_counts[known.ids], known)["ndcg@100"]

    return max((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75), key=quality)


def run_seed(config: OverArchExperiment, seed: int) -> dict[str, dict[str, float]]:
    """Test metrics by method for one training run of the towers."""
    setting = find(config.setting)
    dataset, split = load_split(config.data or setting.data, min_count=setting.min_count)
    model = build_model(setting, dataset, split, seed=seed)
    model = load_towers(setting, model, config.folder / config.setting / f"seed-{seed}")
    table = model.item_embeddings()
    valid = ask(model, split.valid, config.candidates)
    test = ask(model, split.test, config.candidates)
    chooses = np.random.default_rng(seed).random(len(valid.target)) < config.chooser_share
    # A target that was not retrieved would teach that a low dot product is a good sign.
    known = valid.take(~chooses & (valid.ids == valid.target[:, None]).any(axis=1))
    chooser = valid.take(chooses)
    questions = {"": test}
    if dataset.attributes is not None:
        index = ItemIndex.build(
            table[1:], dataset.attributes.features(), key=jax.random.key(seed),
            ids=np.arange(1, len(table)),
        )  # fmt: skip
        filters = target_filters(dataset.attributes, test.target, config.least_passing, seed)
        questions[readme.FILTERED] = ask_filtered(test, index, split.test, filters)

    def measure(values) -> dict[str, float]:
        """Metrics of the test questions, with and without filters, ranked by `values` of them."""
        return {
            prefix + name: metric
            for prefix, asked in questions.items()
            for name, metric in metrics_of(values(asked), asked).items()
        }

    found = {"dot product": measure(lambda asked: asked.dots)}
    print(f"seed {seed}: chooser, dot product {shown(metrics_of(chooser.dots, chooser))}")
    log_counts = np.log1p(item_counts(split.train)).astype(np.float32)
    popularity = popularity_term(log_counts, valid)
    found["dot + popularity"] = measure(
        lambda asked: asked.dots + popularity * log_counts[asked.ids]
    )
    for name in config.overarchs:
        overarch = over_arch(name, table.shape[1], seed)
        print(name)
        started = time.monotonic()
        params, weight, _ = fit(overarch, table, known, chooser, config, seed)
        minutes = (time.monotonic() - started) / 60

        def value(asked, overarch=overarch, params=params, weight=weight):
            return combined(weight, candidate_values(overarch, params, table, asked), asked)

        found[f"dot + {name}"] = {**measure(value), "weight": weight, "minutes": minutes}
    for name, metrics in found.items():
        print(f"  test, {name}: {shown(metrics)}")
    return found


def shown(metrics: dict[str, float]) -> str:
    """The main metrics in a line."""
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in SHOWN)


def measurements(runs: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Every method's figures with samples (one a seed), mean and spread."""
    rows = []
    for method in runs[0]:
        for name in runs[0][method]:
            samples = [run[method][name] for run in runs]
            rows.append(
                {
                    "metric": name,
                    "unit": "min" if name == "minutes" else "1",
                    "workload": method,
                    "samples": samples,
                    "value": float(np.mean(samples)),
                    "spread": float(np.std(samples, ddof=1)) if len(samples) > 1 else 0.0,
                }
            )
    return rows


def recall_plot(measured: list[dict[str, Any]]) -> bytes:
    """Recall of every method, with and without filters."""
    figures = {(m["workload"], m["metric"]): m["value"] for m in measured}
    methods = list(dict.fromkeys(m["workload"] for m in measured))
    names = [name for name in DRAWN if ("dot product", name) in figures]
    series = {method: [figures[method, name] for name in names] for method in methods}
    titles = [readme.overarch_title(name).replace(", ", ",\n") for name in names]
    return report.bars(titles, series, y="recall")


def main(config: OverArchExperiment) -> None:
    """Fits and measures all over-archs for every seed, records and shows them."""
    started = time.monotonic()
    runs = [run_seed(config, seed) for seed in config.seeds]
    measured = measurements(runs)
    setting = find(config.setting)
    dataset, _ = load_split(config.data or setting.data, min_count=setting.min_count)
    path = record.write(
        "overarch",
        config={
            **{k: v for k, v in vars(config).items() if not isinstance(v, Path)},
            "model": vars(replace(setting.model)),
        },
        measurements=measured,
        seeds=config.seeds,
        data=record.describe_data((config.data or setting.data).name, *dataset.files),
        wall_s=time.monotonic() - started,
        scratch=config.scratch,
        folder=config.results,
    )
    path.with_suffix(".png").write_bytes(recall_plot(measured))
    report.print_table(f"{config.setting}: test, history filtered", readme.overarch_rows(measured))
    print(f"recorded in {path}")


if __name__ == "__main__":
    main(tyro.cli(OverArchExperiment))
