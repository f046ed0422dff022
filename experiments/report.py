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
    *("#123f73", "#8a4f0e", "#1c6443", "#54317a"),
    *("#7d1d29", "#2a708c", "#7d6414", "#3d4249"),
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
