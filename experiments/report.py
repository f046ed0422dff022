"""Shows results: tables for the terminal and for Markdown, plots, and HTML pages.

A page is one file: pictures are embedded, so that it can be mailed or opened anywhere.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels._timing import Timing

ROOT = Path(__file__).parent.parent
STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c2430; max-width: 60rem; margin: 2.5rem auto;
       padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.lead { color: #55606e; margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .7rem; border-bottom: 1px solid #e3e7ec; }
th { font-weight: 600; color: #55606e; font-size: .86rem; }
td.number, th.number { text-align: right; }
figure { margin: 1rem 0; max-width: 42rem; } img { max-width: 100%; }
figcaption { color: #55606e; font-size: .9rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
code { background: #f2f4f7; padding: .1rem .35rem; border-radius: .25rem; font-size: .9em; }
"""
COLOURS = [
    *("#2563a8", "#d9822b", "#3a9a6b", "#8a5bb0"),
    *("#b8434e", "#5aa9c9", "#c9a227", "#7a7f87"),
]


def gantt(
    bars: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, str], *, x: str
) -> bytes:
    """Bars (start, length) in one row for each name, the first on top, as PNG bytes."""
    figure, axes = _axes(x, "")
    for place, (name, spans) in enumerate(bars.items()):
        axes.broken_barh(spans, (-place - 0.35, 0.7), color=colours[name], lw=0)
    axes.set_yticks([-place for place in range(len(bars))], list(bars))
    return _png(figure)


def plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    lines: Mapping[str, float] | None = None,
    bottom: float | None = None,
) -> bytes:
    """A line plot as PNG bytes; `lines` are horizontal marks with a name."""
    figure, axes = _axes(x, y)
    for colour, (name, (xs, ys)) in zip(COLOURS * 3, series.items(), strict=False):
        axes.plot(xs, ys, "o-", ms=4, lw=1.8, color=colour, label=name)
    for name, value in (lines or {}).items():
        axes.axhline(value, color="#8a94a0", ls="--", lw=1.2, label=name)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    if len(series) + len(lines or {}) > 1:
        axes.legend(frameon=False)
    return _png(figure)


def bars(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], *, y: str, digits: int | None = 3
) -> bytes:
    """A grouped bar plot as PNG bytes, every bar with its value; without, for many groups."""
    figure, axes = _axes("", y)
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        at = [g + (number - (len(series) - 1) / 2) * width for g in range(len(groups))]
        drawn = axes.bar(at, values, width * 0.92, color=COLOURS[number], label=name)
        if digits is not None:
            upright = 90 if len(series) > 2 else 0  # side by side they would overlap
            axes.bar_label(drawn, fmt=f"%.{digits}f", fontsize=8, padding=2, rotation=upright)
    many = digits is None and len(groups) > 5
    axes.set_xticks(range(len(groups)), groups, rotation=90 if many else 0)
    figure.set_figwidth(max(6.2, 0.7 * len(groups)) if many else 6.2)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    return _png(figure)


def stacked(
    panels: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]], *, x: str, y: str
) -> bytes:
    """Stacked areas as PNG bytes, a panel each: (xs, at each x the heights of all areas)."""
    figure, axes = _axes(x, y, panels=len(panels))
    for panel, (title, (xs, rows)) in zip(axes, panels.items(), strict=True):
        layers = list(zip(*rows, strict=True))
        panel.stackplot(xs, layers, colors=COLOURS, edgecolor="white", lw=0.6)
        panel.set(title=title, xlim=(min(xs), max(xs)), ylim=(0, max(map(sum, rows))))
        panel.grid(visible=False)
    return _png(figure)


def _axes(x: str, y: str, panels: int = 0) -> tuple[Any, Any]:
    """A figure with one pair of axes, or with a list of so many panels side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        1, panels or 1, figsize=(6.2, 3.6), layout="constrained", squeeze=False, sharey=True
    )
    for number, axes in enumerate(grid[0]):
        axes.set(xlabel=x, ylabel="" if number else y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e7ec", lw=0.8)
        axes.set_axisbelow(True)
    return figure, list(grid[0]) if panels else grid[0, 0]


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def figure_html(png: bytes, caption: str) -> str:
    """One embedded picture with its caption."""
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def pair_html(*figures: str) -> str:
    """Figures side by side where there is room."""
    return f'<div class="pair">{"".join(figures)}</div>'


def cell(value: Any) -> str:
    """A table cell as text: fractions with four digits, counts with separators."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as an HTML table."""
    names = list(rows[0])
    numeric = {n: all(isinstance(row[n], int | float) for row in rows) for n in names}

    def line(tag: str, texts: Sequence[str]) -> str:
        cells = [
            f"<{tag}{' class=number' if numeric[n] else ''}>{html.escape(t)}</{tag}>"
            for n, t in zip(names, texts, strict=True)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    body = [line("td", [cell(row[n]) for n in names]) for row in rows]
    return f"<table>{line('th', names)}{''.join(body)}</table>"


def table_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(cell(row[n]) for n in names)} |" for row in rows]
    return "\n".join(lines)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[cell(value) for value in row.values()])
    console = Console()
    (console if console.is_terminal else Console(width=110)).print(table)


def print_timing_head() -> None:
    """The head over the lines of `print_timing`."""
    names = f"{'workload':13} {'variant':12}"
    print(f"{names} {'p50 us':>10} {'GB/s':>8} {'floor MB':>9} {'x copy':>7}", flush=True)


def print_timing(
    workload: str, variant: str, timing: Timing, floor_bytes: int, copy: Timing
) -> None:
    """A kernel's median time, the rate at which it moves its floor, and the time by a copy's."""
    gbps = floor_bytes / max(timing.p50_us, 1e-9) / 1e3
    ratio = timing.p50_us / max(copy.p50_us, 1e-9)
    names = f"{workload:13} {variant:12}"
    rates = f"{timing.p50_us:10.1f} {gbps:8.1f} {floor_bytes / 1e6:9.2f} {ratio:7.2f}"
    print(f"{names} {rates}", flush=True)


def write_page(path: Path, *, title: str, lead: str, sections: Sequence[tuple[str, str]]) -> Path:
    """Writes an HTML page of (heading, HTML) sections."""
    body = "".join(f"<h2>{html.escape(head)}</h2>{content}" for head, content in sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p>{body}</html>\n'
    )
    return path


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
    return f"{figures['minutes']['value']:.1f} ({cores})" if "minutes" in figures else "-"


def accuracy_section_markdown() -> str:
    """README's table of accuracy on real data, with where it was measured."""
    from experiments import record

    results = record.read_all("train_sequence")
    if not results:
        return "Nothing recorded yet."
    env = results[-1]["env"]
    versions = ", ".join(f"{name} {env[name]}" for name in ("jax", "flax", "python"))
    return (
        f"{table_markdown(accuracy_rows(results))}\n\n"
        f"Measured on {env['device_kind']} ({versions}) with "
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
    from experiments import record

    newest = {result["command"]: result for result in record.read_all("overarch")}
    return "\n\n".join(map(_overarch_markdown, newest.values())) or "Nothing recorded yet."


def _overarch_markdown(result: Mapping[str, Any]) -> str:
    env, seeds = result["env"], ", ".join(map(str, result["seeds"]))
    return (
        f"{table_markdown(overarch_rows(result['measurements']))}\n\n"
        f"`{result['command']}` on {env['device_kind']} (jax {env['jax']}): test users, history "
        f"filtered, the {result['config']['candidates']} best items by dot product re-ranked. The "
        f"over-archs and the popularity term learned from validation items, which the towers have "
        f"not been trained on; seeds {seeds}. Filtered: asked with one of the target's attributes."
        f"{picture_markdown(result, 'recall of each way of ranking')}"
    )


def picture_markdown(result: Mapping[str, Any], caption: str, to_root: str = "") -> str:
    """A recorded result's picture, as README shows it; nothing where there is none."""
    path = result["path"].with_suffix(".png")
    return f"\n\n![{caption}]({to_root}{path.relative_to(ROOT)})" if path.exists() else ""


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
    from experiments import record

    results = record.read_all("bench_retrieval")
    if not results:
        return "Nothing recorded yet."
    env, config = results[-1]["env"], results[-1]["config"]
    return (
        f"{table_markdown(beside_peers(results[-1]['measurements']))}\n\n"
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
    from experiments import record

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
        f"{title}:\n\n{table_markdown(_memory_rows(result['measurements'], table, first))}"
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
    from experiments import record

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
        f"{table_markdown(rows)}\n\n"
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
    from experiments import record

    newest = {result["command"]: result for result in record.read_all("faults")}
    if not newest:
        return "Nothing recorded yet."
    result = list(newest.values())[-1]
    config = result["config"]
    seen = [m for run in newest.values() for m in run["measurements"]]
    commands = " and ".join(f"`{command}`" for command in newest)
    return (
        f"{table_markdown(fault_rows(seen))}\n\n"
        f"{commands}: {config['processes']} processes of {config['devices']} CPU devices, time-out "
        f"{config['heartbeat']:g} s (jax {result['env']['jax']}). After a fault that ends the job "
        "the others have named the lost process, and the same command goes on from the last "
        "checkpoint; weights and moments are compared with those of a job without faults."
    )


SECTIONS = {
    "balance_speedup": balance_speedup_section_markdown,
    "faults": faults_section_markdown,
    "bench_retrieval": retrieval_section_markdown,
    "train_sequence": accuracy_section_markdown,
    "overarch": overarch_section_markdown,
    "moe_memory": moe_memory_section_markdown,
}
READMES = (ROOT / "README.md", ROOT / "pallas_kernels" / "moe" / "README.md")


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
