"""From clicks to filtered recommendations, end to end.

    python -m experiments.quickstart                                  # synthetic catalogue
    python -m experiments.quickstart --data ../shared/data/amazon-beauty

Trains a SASRec, measures it against popularity, restores it in a fresh process, publishes it as a
filtered retriever, answers queries, and writes `<folder>/report.html`. Stop it at any time: the
same command goes on from there. About two minutes on two CPU cores.
"""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import record, report
from jaxrec.data import (
    Dataset,
    EvalSet,
    ItemAttributes,
    Split,
    item_counts,
    leave_one_out,
    make_query_batch,
    read_dataset,
    synthetic_catalogue,
)
from jaxrec.nn import SASRec, SASRecConfig
from jaxrec.ops.metrics import ranking_metrics
from jaxrec.retrieval import (
    ItemIndex,
    Retriever,
    brute_force,
    load_retriever,
    publish,
    recall,
    unpack_mask,
)
from jaxrec.train import (
    CheckpointStore,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    evaluate_ranking,
    init_state,
    make_optimizer,
    make_rank_fn,
    popularity_ranks,
    read_log,
    run_config,
    train,
    use_compile_cache,
    with_params,
)

K = 100
NUM_QUERIES = 256


@dataclass(frozen=True)
class Quickstart:
    """What to run.

    Attributes:
      data: a dataset folder (see `jaxrec.data.read_dataset`); None makes a synthetic catalogue.
      folder: where everything is written; a folder of its own for every dataset.
      num_epochs: at most; training stops before when the validation set says so.
      stage: "all" runs both; "serve" is what the fresh process runs.
    """

    data: Path | None = None
    folder: Path | None = None
    num_epochs: int = 12
    seed: int = 0
    stage: Literal["all", "serve"] = "all"

    @property
    def run_folder(self) -> Path:
        """The given folder, or one named after the data."""
        name = "quickstart" if self.data is None else f"quickstart-{self.data.resolve().name}"
        return self.folder or Path("runs") / name


def load(data: Path | None) -> tuple[Dataset, Split]:
    """The dataset and its leave-one-out split."""
    if data is None:
        made = synthetic_catalogue()
        dataset = Dataset(made.interactions, made.attributes, [])
    else:
        dataset = read_dataset(data)
    return dataset, leave_one_out(dataset.interactions)


def make_model(num_items: int, seed: int) -> SASRec:
    """A small SASRec with a causal frequency filter beside attention."""
    config = SASRecConfig(num_items=num_items, max_len=50, dropout=0.3, filter_share=0.7)
    return SASRec(config, rngs=nnx.Rngs(seed))


def make_train_config(config: Quickstart) -> TrainConfig:
    """Settings that suit catalogues of some thousand items."""
    return TrainConfig(
        token_budget=1024,
        loss=LossConfig("sampled", num_negatives=512, negatives="popularity"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        ema_decay=0.999,
        num_epochs=config.num_epochs,
        eval_users=4096,
        patience=3,
        seed=config.seed,
    )


def train_stage(config: Quickstart) -> None:
    """Trains (or goes on training), and compares with popularity on the test items."""
    dataset, split = load(config.data)
    model = make_model(split.train.num_items, config.seed)
    print(
        f"{len(split.train):,} users, {split.train.num_items:,} items, "
        f"{len(dataset.interactions):,} events"
    )
    started = time.monotonic()
    result = train(model, split, config=make_train_config(config), folder=config.run_folder)
    minutes = (time.monotonic() - started) / 60
    if result.stopped_because.startswith("SIG"):
        sys.exit(f"stopped by {result.stopped_because}; the same command goes on from here")
    metrics = evaluate_ranking(
        make_rank_fn(model), result.best_state.eval_params, split.test, max_len=model.config.max_len
    )
    popular = ranking_metrics(popularity_ranks(item_counts(split.train), split.test))
    record.write_json(
        config.run_folder / "accuracy.json",
        {
            "sasrec": metrics,
            "popularity": popular,
            "best_step": result.best_step,
            "minutes": minutes,
            "users": len(split.train),
            "items": split.train.num_items,
            "events": len(dataset.interactions),
        },
    )
    report.print_table(
        "Test items, full ranking, history filtered",
        [
            {"model": name, **{m: values[m] for m in ("hr@10", "ndcg@10", "mrr")}}
            for name, values in (("SASRec", metrics), ("popularity", popular))
        ],
    )


def serve_stage(config: Quickstart) -> None:
    """In a fresh process: restore the checkpoint, publish, load, answer, measure."""
    dataset, split = load(config.data)
    model = restore_model(config, split)
    attributes = dataset.attributes or no_attributes(dataset)
    started = time.monotonic()
    version = publish(
        model,
        attributes.features(),
        folder=config.run_folder / "published",
        model_config=asdict(model.config),
        sample_queries=query_vectors(model, split.valid),
        vocabulary=dataset.interactions.items.ids.tolist(),
    )
    retriever = load_retriever(
        config.run_folder / "published",
        build_model=lambda saved: SASRec(SASRecConfig.from_dict(saved), rngs=nnx.Rngs(0)),
    )
    index = item_index(retriever)
    print(
        f"published version {version} and loaded it again in {time.monotonic() - started:.1f} s: "
        f"{index.ivf.nlist} lists, {index.nprobe} probed by default"
    )
    filters = choose_filters(attributes)
    by_filter = measure_filters(retriever, split.test, filters)
    by_probes = measure_probes(retriever, split.test)
    answers = example_answers(retriever, split.test, filters, attributes)
    report.print_table("Filtered queries", answers)
    report.print_table(f"recall@{K} against exact search", by_filter)
    record.write_json(
        config.run_folder / "retrieval.json",
        {
            "filters": by_filter,
            "probes": by_probes,
            "answers": answers,
            "nprobe": index.nprobe,
            "nlist": index.ivf.nlist,
        },
    )


def restore_model(config: Quickstart, split: Split) -> SASRec:
    """The best checkpoint's averaged weights, in a model made anew."""
    model = make_model(split.train.num_items, config.seed)
    train_config = make_train_config(config)
    state = init_state(
        model,
        make_optimizer(train_config.optimizer),
        seed=config.seed,
        ema_decay=train_config.ema_decay,
    )
    with CheckpointStore(
        config.run_folder, best_metric=train_config.monitor, read_only=True
    ) as store:
        restored = store.restore(
            state,
            step="best",
            config=run_config(model, train_config),
            may_differ=("loop", "train.num_epochs"),
        )
    return with_params(model, restored.state.eval_params)


def no_attributes(dataset: Dataset) -> ItemAttributes:
    """For data without attributes: how popular an item is, so that there is something to filter."""
    items = dataset.interactions.items
    counts = np.bincount(dataset.interactions.item_index, minlength=items.size + 1)[1:]
    band = np.digitize(counts, np.quantile(counts, [0.5, 0.9, 0.99]))
    names = [(), *((("rare", "known", "popular", "hit")[b],) for b in band)]
    return ItemAttributes({"popularity": names}, items, 0)


def choose_filters(attributes: ItemAttributes) -> list[str | None]:
    """Filters from permissive to selective, made of the values that the catalogue holds."""
    num_items = attributes.items.size
    counts = Counter(
        (feature, value)
        for feature, rows in attributes.values.items()
        for row in rows
        for value in row
    )
    terms = []  # one for every share, the value that comes closest to it
    for share in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005):
        nearest = min(counts, key=lambda term: abs(np.log(counts[term] / num_items / share)))
        terms.append(f'{nearest[0]}:"{nearest[1]}"')
    terms = list(dict.fromkeys(terms))
    filters = [None, f"NOT {terms[-1]}", *terms]
    filters += [f"{a} OR {b}" for a, b in pairwise(terms[2:5])]
    filters += [f"{a} AND NOT {b}" for a, b in pairwise(terms[:2])]
    return list(dict.fromkeys(filters))


def query_batch(model: Any, questions: EvalSet, num_queries: int = NUM_QUERIES) -> Any:
    """The first histories as one batch."""
    rows = np.arange(min(num_queries, len(questions)))
    return make_query_batch(
        questions.histories,
        rows,
        max_len=model.config.max_len,
        token_budget=len(rows) * model.config.max_len,
        max_sequences=len(rows),
    )


def query_vectors(model: SASRec, questions: EvalSet) -> jax.Array:
    """What the tower asks for the first histories."""
    batch = query_batch(model, questions)
    return model.encode(batch)[jnp.asarray(batch.target_positions)]


def item_index(retriever: Retriever) -> ItemIndex:
    """The retriever's index, which was built from items here."""
    assert isinstance(retriever.index, ItemIndex)
    return retriever.index


def num_results(retriever: Retriever) -> int:
    """K, or all items of a smaller catalogue."""
    return min(K, retriever.index.max_k)


def eligible_items(retriever: Retriever, text: str | None) -> np.ndarray:
    """Numbers of the items that pass a filter."""
    index = item_index(retriever)
    mask = index.bloom.search(index.compile([text]), exact=True)
    row_ids = np.asarray(index.ivf.row_ids)
    return np.sort(row_ids[np.asarray(unpack_mask(mask, len(row_ids)))[0]])


def measure_filters(
    retriever: Retriever, questions: EvalSet, filters: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Recall of the default and of the exact search for each filter, by selectivity."""
    batch = query_batch(retriever.model, questions)
    queries, table = tower_outputs(retriever, batch)
    rows = []
    for text in filters:
        eligible = eligible_items(retriever, text)
        truth = brute_force(queries, table, eligible, k=num_results(retriever))
        plan = retriever.compile([text] * len(queries))
        k = num_results(retriever)
        found, exact = retriever(batch, plan, k=k), retriever(batch, plan, k=k, exact=True)
        rows.append(
            {
                "filter": text or "everything",
                "eligible": len(eligible),
                "selectivity": f"{100 * len(eligible) / (len(table) - 1):.2f} %",
                "results": int(np.asarray(found.filled).mean()),
                f"recall@{K}": recall(found.ids, truth),
                "with exact": recall(exact.ids, truth),
            }
        )
    return sorted(rows, key=lambda row: -row["eligible"])


def tower_outputs(retriever: Retriever, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Query vectors of a batch, and the item embeddings."""
    table = retriever.model.item_embeddings()  # pyright: ignore[reportAttributeAccessIssue]
    return np.asarray(retriever.queries(batch)), np.asarray(table)


def measure_probes(retriever: Retriever, questions: EvalSet) -> list[dict[str, Any]]:
    """Recall of the bare index, without a filter, by the number of probed lists."""
    queries, table = tower_outputs(retriever, query_batch(retriever.model, questions))
    index, k = item_index(retriever), num_results(retriever)
    truth = brute_force(queries, table, np.arange(1, len(table)), k=k)
    probes = sorted({1, 2, 4, 8, 16, 32, 64, index.nprobe, index.ivf.nlist})
    return [
        {"nprobe": n, "recall": recall(index.ivf.search(queries, k=k, nprobe=n).ids, truth)}
        for n in probes
        if n <= index.ivf.nlist
    ]


def example_answers(
    retriever: Retriever,
    questions: EvalSet,
    filters: Sequence[str | None],
    attributes: ItemAttributes,
) -> list[dict[str, str]]:
    """What a few users get under different filters, items with their first attributes."""
    chosen = list(filters)[:: max(1, len(filters) // 5)][:5]
    batch = query_batch(retriever.model, questions, len(chosen))
    found = retriever(batch, retriever.compile(chosen), k=3, exclude_history=True)
    rows = []
    for user, (text, ids) in enumerate(zip(chosen, np.asarray(found.ids), strict=True)):
        history = questions.histories.sequence(user)[-3:]
        rows.append(
            {
                "last items": ", ".join(describe(int(i), attributes) for i in history),
                "filter": text or "everything",
                "recommended": ", ".join(describe(int(i), attributes) for i in ids if i > 0),
            }
        )
    return rows


def describe(item: int, attributes: ItemAttributes) -> str:
    """An item's raw id with the first value of its first features."""
    values = [str(rows[item][0]) for rows in list(attributes.values.values())[:2] if rows[item]]
    return f"{attributes.items.raw_of(item)} ({' '.join(values)})" if values else str(item)


def write_report(config: Quickstart) -> Path:
    """The page that shows the whole run."""
    folder = config.run_folder
    accuracy, retrieval = (
        record.read_json(folder / "accuracy.json"),
        record.read_json(folder / "retrieval.json"),
    )
    return report.write_page(
        folder / "report.html",
        title="jaxrec quickstart",
        lead=(
            f"{'Synthetic catalogue' if config.data is None else config.data.name}: "
            f"{accuracy['users']:,} users, {accuracy['items']:,} items, {accuracy['events']:,} "
            "events. SASRec trained, published and queried on "
            f"{jax.devices()[0].platform.upper()}."
        ),
        sections=[
            ("Training", training_figures(folder)),
            ("Accuracy on held-out items", accuracy_section(accuracy)),
            ("Retrieval against exact search", retrieval_figures(retrieval)),
            ("Filters", report.table_html(retrieval["filters"])),
            ("Recommendations", report.table_html(retrieval["answers"])),
        ],
    )


def training_figures(folder: Path) -> str:
    """Loss and validation accuracy by step."""
    steps, evals = read_log(folder, "train"), read_log(folder, "eval")
    loss = report.plot(
        {"loss": ([s["step"] for s in steps], [s["loss"] for s in steps])}, x="step", y="loss"
    )
    at = [e["step"] for e in evals]
    curves = {name.upper(): (at, [e[name] for e in evals]) for name in ("hr@10", "ndcg@10")}
    valid = report.plot(curves, x="step", y="validation", bottom=0)
    return report.pair_html(
        report.figure_html(loss, "Training loss"),
        report.figure_html(valid, "Accuracy on the validation items"),
    )


def accuracy_section(accuracy: Mapping[str, Any]) -> str:
    """SASRec beside popularity, as bars and as a table."""
    names = ["hr@5", "hr@10", "hr@20", "ndcg@10", "mrr"]
    models = {"SASRec": accuracy["sasrec"], "popularity": accuracy["popularity"]}
    picture = report.bars(
        [name.upper() for name in names],
        {model: [values[n] for n in names] for model, values in models.items()},
        y="test metric",
    )
    caption = "Leave-one-out, full ranking, history filtered, ties counted against the model"
    rows = [{"model": model, **{n: v[n] for n in names}} for model, v in models.items()]
    return report.figure_html(picture, caption) + report.table_html(rows)


def retrieval_figures(retrieval: Mapping[str, Any]) -> str:
    """Recall by probes and by selectivity."""
    probes, filters = retrieval["probes"], retrieval["filters"]
    by_probes = report.plot(
        {"recall": ([p["nprobe"] for p in probes], [p["recall"] for p in probes])},
        x=f"lists probed, of {retrieval['nlist']}",
        y=f"recall@{K}",
        log_x=True,
        lines={f"default: {retrieval['nprobe']} lists, target 0.95": 0.95},
    )
    shares = [float(f["selectivity"].split()[0]) for f in filters]
    by_filter = report.plot(
        {
            "default probes": (shares, [f[f"recall@{K}"] for f in filters]),
            "exact": (shares, [f["with exact"] for f in filters]),
        },
        x="eligible items, %",
        y=f"recall@{K}",
        log_x=True,
        bottom=0,
    )
    return report.pair_html(
        report.figure_html(by_probes, "Recall against probes, no filter"),
        report.figure_html(by_filter, "Recall against selectivity"),
    )


def main(config: Quickstart) -> None:
    """Runs the stages."""
    use_compile_cache(config.run_folder / "compiled")
    if config.stage == "serve":
        serve_stage(config)
        return
    train_stage(config)
    command = [sys.executable, "-m", "experiments.quickstart", "--stage", "serve"]
    command += ["--folder", str(config.run_folder), "--seed", str(config.seed)]
    command += [] if config.data is None else ["--data", str(config.data)]
    subprocess.run(command, check=True)
    page = write_report(config)
    print(f"report: {page}")
    accuracy = record.read_json(config.run_folder / "accuracy.json")
    models = [("SASRec", accuracy["sasrec"]), ("popularity", accuracy["popularity"])]
    print(" · ".join(f"{n} HR@10 {m['hr@10']:.4f} NDCG@10 {m['ndcg@10']:.4f}" for n, m in models))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Quickstart))
