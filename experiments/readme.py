"""The generated sections of READMEs, made from what is recorded.

python -m experiments.readme
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import record, report


def accuracy_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a setting, from the newest result of each, with mean ± spread over the seeds."""
    newest = {result["config"]["setting"]: result for result in results}
    rows = []
    for setting, result in sorted(newest.items()):
        figures = {m["metric"]: m for m in result["measurements"]}
        seeds = len(result["seeds"])

        def shown(name: str, figures: Mapping[str, Any] = figures, seeds: int = seeds) -> str:
            spread = f" ± {figures[name]['spread']:.4f}" if seeds > 1 else ""
            return f"{figures[name]['value']:.4f}{spread}"

        rows.append(
            {
                "setting": f"`{setting}`",
                "HR@10": shown("hr@10"),
                "NDCG@10": shown("ndcg@10"),
                "seeds": str(seeds),
                "minutes a seed (cores)": _minutes(figures, result["env"]["cpu_cores"]),
                "published HR@10 / NDCG@10": "; ".join(result["published"]) or "-",
            }
        )
    return rows


def _minutes(figures: Mapping[str, Any], cores: int) -> str:
    if "minutes" not in figures:
        return "-"
    shown = f"{figures['minutes']['value']:.1f} ({cores})"
    if "minutes an epoch" in figures:
        shown += f", {60 * figures['minutes an epoch']['value']:.0f} s an epoch"
    return shown


def accuracy_section_markdown() -> str:
    """README's table of accuracy on real data, with where it was measured."""
    results = record.read_all("train_sequence")
    if not results:
        return "Nothing recorded yet."
    env = results[-1]["env"]
    versions = ", ".join(f"{name} {env[name]}" for name in ("jax", "flax", "python"))
    machines = " and ".join(sorted({result["env"]["device_kind"] for result in results}))
    return (
        f"{report.table_markdown(accuracy_rows(results))}\n\n"
        f"Measured on {machines} ({versions}) with "
        "`python -m experiments.train_sequence <setting> --seeds …`; each result file names its "
        "command, commit and data hash. Minutes are wall time on so many cores of a machine that "
        "was doing other work as well."
    )


OVERARCH_METRICS = ("hr@10", "hr@100", "ndcg@10", "ndcg@100")
FILTERED = "filtered "  # before the names of metrics of filtered questions
OVERARCH_FILTERED = (f"{FILTERED}hr@10", f"{FILTERED}hr@100")


def overarch_title(name: str) -> str:
    """A metric's name as tables and plots show it."""
    title = name.removeprefix(FILTERED).upper().replace("HR", "recall")
    return f"{title}, filtered" if name.startswith(FILTERED) else title


def overarch_rows(measurements: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a method of ranking, with the gain over the dot product."""
    figures = {(m["workload"], m["metric"]): m["value"] for m in measurements}
    rows = []
    for method in dict.fromkeys(m["workload"] for m in measurements):
        row = {"ranked by": method}
        for name in OVERARCH_METRICS + OVERARCH_FILTERED:
            if (method, name) not in figures:  # of a dataset without attributes
                continue
            value, base = figures[method, name], figures["dot product", name]
            gain = "" if method == "dot product" else f" ({100 * (value / base - 1):+.1f} %)"
            row[overarch_title(name)] = f"{value:.4f}{gain}"
        rows.append(row)
    return rows


def overarch_section_markdown() -> str:
    """A table for the newest result of each over-arch command."""
    newest = {result["command"]: result for result in record.read_all("overarch")}
    return "\n\n".join(map(_overarch_markdown, newest.values())) or "Nothing recorded yet."


def _overarch_markdown(result: Mapping[str, Any]) -> str:
    env, seeds = result["env"], ", ".join(map(str, result["seeds"]))
    return (
        f"{report.table_markdown(overarch_rows(result['measurements']))}\n\n"
        f"`{result['command']}` on {env['device_kind']} (jax {env['jax']}): test users, history "
        f"filtered, the {result['config']['candidates']} best items by dot product re-ranked. The "
        f"over-archs and the popularity term learned from validation items, which the towers have "
        f"not been trained on; seeds {seeds}. Filtered: asked with one of the target's attributes."
        f"{picture_markdown(result, 'recall of each way of ranking')}"
    )


def picture_markdown(result: Mapping[str, Any], caption: str, to_root: str = "") -> str:
    """A recorded result's picture, as README shows it; nothing where there is none."""
    path = result["path"].with_suffix(".png")
    return f"\n\n![{caption}]({to_root}{path.relative_to(report.ROOT)})" if path.exists() else ""


ENOUGH = 0.95  # recall at which the peers' speed counts


def beside_peers(measurements: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a filter: ours, and each peer's fastest setting that finds enough."""
    rows = []
    for name in dict.fromkeys(m["filter"] for m in measurements):
        own = [m for m in measurements if m["filter"] == name]
        mine = next(m for m in own if m["variant"] == "jaxrec")
        row = {
            "filter": name.replace("_", " "),
            "searched by": mine["note"],
            "jaxrec: queries/s (recall)": f"{mine['value']:,.0f} ({mine['recall']:.3f})",
        }
        for peer in ("IVFFlat", "IVFSQ8", "usearch", "ScaNN"):
            settings = [m for m in own if m["variant"].split()[0] == peer]
            row[f"{peer}, recall ≥ {ENOUGH}"] = _speed_beside(mine, settings, ENOUGH)
            if peer.startswith("IVF"):
                best = max((m["recall"] for m in settings), default=0)
                equal = _speed_beside(mine, settings, min(best, mine["recall"]))
                row[f"{peer}, recall as ours"] = f"{equal} at {min(best, mine['recall']):.3f}"
        rows.append(row)
    return rows


def _speed_beside(mine: Mapping[str, Any], settings: Sequence[Mapping[str, Any]], recall) -> str:
    enough = [m["value"] for m in settings if m["recall"] >= recall]
    return f"{max(enough):,.0f} ({mine['value'] / max(enough):.2f}×)" if enough else "-"


def retrieval_section_markdown() -> str:
    """README's table of filtered search beside the peers, from the newest result."""
    results = record.read_all("bench_retrieval")
    if not results:
        return "Nothing recorded yet."
    env, config = results[-1]["env"], results[-1]["config"]
    return (
        f"{report.table_markdown(beside_peers(results[-1]['measurements']))}\n\n"
        f"`{results[-1]['command']}` on {env['device_kind']}, {env['cpu_cores']} cores (jax "
        f"{env['jax']}): {config['items']:,} items × {config['width']}, {config['lists']} lists, "
        f"k = {config['k']}, batches of {config['batch']}, {config['threads']} threads for each. "
        "A peer's figure is its fastest setting with that recall, and behind it how many times as "
        "fast ours is; where it cannot reach ours, with the highest it has. IVFFlat and IVFSQ8 are "
        "faiss's, which filters while it scans; "
        "usearch and ScaNN fetch more and drop, down to filters that pass a tenth."
        f"{picture_markdown(results[-1], 'recall against queries a second')}"
    )


def _memory_rows(measurements: Sequence[Mapping[str, Any]], table: str, first: str):
    """One of the tables of `experiments.moe_memory`: predicted, and in brackets as compiled."""
    rows: dict[str, dict[str, str]] = {}
    for m in measurements:
        kind, column = m["metric"].split(" ", 1)
        if kind == table:
            row = rows.setdefault(m["workload"], {first: m["workload"]})
            predicted = column.removesuffix(", compiled")
            row[predicted] = (
                f"{m['value']:.2f}"
                if predicted == column
                else f"{row[predicted]} ({m['value']:.2f})"
            )
    return list(rows.values())


def moe_memory_section_markdown() -> str:
    """What MoE layers save and need at the peak, from the newest result with compiled peaks."""
    results = [result for result in record.read_all("moe_memory") if result["config"]["compiled"]]
    if not results:
        return "Nothing recorded yet."
    result, model = results[-1], results[-1]["config"]["model"]
    titles = {
        "saved": ("layer", "GB that one layer in bf16 saves for its gradient"),
        "peak": (
            "layer",
            "GB at its peak: predicted, and in brackets what the compiler says for an H200",
        ),
        "chunks": ("T", f"GB at the peak of `{model}` by tokens and `chunk_tokens`"),
    }
    tables = [
        f"{title}:\n\n{report.table_markdown(_memory_rows(result['measurements'], table, first))}"
        for table, (first, title) in titles.items()
    ]
    return "\n\n".join(
        [
            *tables,
            f"`{result['command']}` (jax {result['env']['jax']}), without a GPU: bytes, not times.",
        ]
    ) + picture_markdown(result, "peak against tokens", "../../")


def balance_speedup_section_markdown() -> str:
    """Steps of several processes, as read and balanced, beside the prediction; newest result."""
    results = record.read_all("balance_speedup")
    if not results:
        return "Nothing recorded yet."
    result, config, checks = results[-1], results[-1]["config"], results[-1]["checks"]
    rows = [
        {
            "samples": m["samples"],
            "measured, ms": f"{m['measured, ms']:.1f}",
            "predicted, ms": f"{m['predicted, ms']:.1f}",
            "prediction off by": m["prediction off by"],
            "slowest / mean rank": f"{m['slowest / mean rank']:.2f}",
        }
        for m in result["measurements"]
    ]
    return (
        f"{report.table_markdown(rows)}\n\n"
        f"`{result['command']}` on {result['env']['device_kind']} (jax {result['env']['jax']}): "
        f"{config['processes']} processes, each {config['samples']} samples a step of "
        f"{min(config['lengths'])} to {max(config['lengths'])} tokens through an HSTU of width "
        f"{config['width']}, the mean of {config['steps']} steps; balance makes them "
        f"{checks['speed_up']:.2f} times as fast, {checks['predicted_speed_up']:.2f} times by the "
        "cost model. The processes share a processor, so they computed in turns and what counts is "
        f"processor time, the least of {config['repeats']} repetitions; a step is its slowest "
        "rank, exchanges not included."
    )


FAULTS = {
    "kill": "SIGKILL of a random process at a random moment",
    "lost_coordinator": "SIGKILL of process 0, where all meet",
    "short_stop": "SIGSTOP for half the time-out",
    "long_stop": "SIGSTOP for longer",
    "full_disk": "one process may write no file (RLIMIT_FSIZE)",
    "preempt": "SIGTERM to one process",
    "corrupt_shard": "a byte of the newest checkpoint altered",
    "elastic": "finished by one process with all the devices",
    "fewer_devices": "finished by one process with its own devices alone",
}


def fault_rows(measurements: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a fault: how often, how soon all processes had ended, what became of the weights."""
    rows = []
    for fault, what in FAULTS.items():
        own = [m for m in measurements if m["workload"] == fault]
        if not own:
            continue
        seconds = sorted(s for m in own for s in m["seconds until all had ended"])
        ended = f"{seconds[len(seconds) // 2]:.1f} ({seconds[-1]:.1f})" if seconds else "-"
        error = max(m["value"] for m in own)
        rows.append(
            {
                "fault": what,
                "times": str(max(len(seconds), len(own))),
                "s until all had ended: median (max)": ended,
                "final weights": "the same bits" if error == 0 else f"within {error:.0e}",
            }
        )
    return rows


def faults_section_markdown() -> str:
    """README's table of faults, from the newest result."""
    newest = {result["command"]: result for result in record.read_all("faults")}
    if not newest:
        return "Nothing recorded yet."
    result = list(newest.values())[-1]
    config = result["config"]
    seen = [m for run in newest.values() for m in run["measurements"]]
    commands = " and ".join(f"`{command}`" for command in newest)
    return (
        f"{report.table_markdown(fault_rows(seen))}\n\n"
        f"{commands}: {config['processes']} processes of {config['devices']} CPU devices, time-out "
        f"{config['heartbeat']:g} s (jax {result['env']['jax']}). After a fault that ends the job "
        "the others have named the lost process, and the same command goes on from the last "
        "checkpoint; weights and moments are compared with those of a job without faults."
    )


def training_rows(measurements: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a case: medians of ours and of the others, which took how many times as long."""
    rows = []
    for case in dict.fromkeys(m["workload"] for m in measurements):
        times = {m["backend"]: m["p50"] for m in measurements if m["workload"] == case}
        shown = {
            name: f"{time / 1e3:.0f}" + f" ({time / times['ours']:.1f}×)" * (name != "ours")
            for name, time in times.items()
        }
        rows.append(
            {"step of": f"`{case}`"} | {f"{name}, ms": text for name, text in shown.items()}
        )
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def training_section_markdown() -> str:
    """README's table of training steps beside PyTorch."""
    results = record.read_all("bench_training")
    if not results:
        return "Nothing recorded yet."
    env = results[-1]["env"]
    return (
        f"{report.table_markdown(training_rows(results[-1]['measurements']))}\n\n"
        f"`{results[-1]['command']}` on {env['device_kind']}, {env['cpu_cores']} cores (jax "
        f"{env['jax']}): medians of one run, in turns; PyTorch eager, its sequences padded; "
        "automatic: blocks keep what automatic differentiation keeps."
    )


SECTIONS = {
    "bench_training": training_section_markdown,
    "balance_speedup": balance_speedup_section_markdown,
    "faults": faults_section_markdown,
    "bench_retrieval": retrieval_section_markdown,
    "train_sequence": accuracy_section_markdown,
    "overarch": overarch_section_markdown,
    "moe_memory": moe_memory_section_markdown,
}
READMES = (report.ROOT / "README.md", report.ROOT / "pallas_kernels" / "moe" / "README.md")


def fill_sections(text: str) -> str:
    """`text` with every generated section that it has made anew."""
    for name, make in SECTIONS.items():
        start, end = f"<!-- results: {name} -->", f"<!-- end: {name} -->"
        if start in text:
            before, rest = text.split(start)
            text = f"{before}{start}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(fill_sections(readme.read_text()))
    print(f"filled {', '.join(SECTIONS)}")
