"""What travels beneath computation in a sharded training step, compiled for H200s without one.

    python -m experiments.overlap_report                      # 8 and 256 of them
    python -m experiments.overlap_report --devices 8 --layers 4

Two steps are compiled by the CUDA plugin (`make aot` installs it): the plain one, which waits for
every exchange, and the prioritised one. For each the overlap score of its all-to-alls is printed
and the schedule is drawn, with times from the machine's published rates. The dense layers are the
projections of HSTU; attention, which would hide still more, is left out.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import Mesh, PartitionSpec

from experiments import record, report
from jaxrec.distributed import (
    LATE,
    EmbeddingTable,
    Machine,
    PipelineState,
    PrioritizedStep,
    RowAdagrad,
    Schedule,
    ShardedState,
    ShardedTables,
    XlaOptions,
    init_sharded_state,
    make_sharded_step,
    timeline,
)
from pallas_kernels.aot import aot_available, compile_for_h200, h200_mesh

AXIS = "data"


@dataclass(frozen=True)
class Case:
    """A training step with one sharded table; the defaults are published sizes.

    Attributes:
      devices: that hold a part of the table each, and a part of the batch.
      tokens: of each device; 32 sequences of 1,024 on average.
      width: of the dense layers.
      layers: of them.
      row_width: f32 values of a table's row.
      num_rows: of the table, for each device.
      rows_per_token: places in the boxes that a device exchanges.
      late_share: of these places, for rows that two successive batches share: a low single-digit
        percentage, as FreeScale reports.
    """

    devices: int = 8
    tokens: int = 32_768
    width: int = 1024
    layers: int = 8
    row_width: int = 512
    num_rows: int = 1_000_000
    rows_per_token: float = 1.125
    late_share: float = 1 / 32

    @property
    def capacity(self) -> dict[str, int]:
        """Places of a box, for all rows and for late ones."""
        places = max(1, round(self.tokens * self.rows_per_token / self.devices))
        return {"items": places, "items" + LATE: max(1, round(places * self.late_share))}


class Step(NamedTuple):
    """A step to compile: the function, shapes of its arguments, and how they are split."""

    function: Any
    shapes: tuple[Any, ...]
    specs: tuple[Any, ...]

    def schedule(self, mesh: Mesh, options: Mapping[str, Any]) -> Schedule:
        """Of the compiled step; the state's sharding does not change."""
        compiled = compile_for_h200(
            self.function, *self.shapes, mesh=mesh, in_shardings=self.specs,
            out_shardings=(self.specs[0], None), compiler_options=options,
        )  # fmt: skip
        return Schedule.read(compiled.hlo_text)


def projections(params: Mapping[str, jax.Array], embedded: Any, batch: jax.Array) -> Any:
    """The matrix products of HSTU's layers, and a loss."""
    x = embedded["items"].astype(jnp.bfloat16) @ params["first"]
    for uvqk, out in zip(params["uvqk"], params["out"], strict=True):
        u, v, *_ = jnp.split(jax.nn.silu(x @ uvqk), 4, axis=1)
        x = x + (u * v) @ out
    return jnp.mean((x.astype(jnp.float32) - batch) ** 2), None


def build(case: Case, mesh: Mesh, *, prioritized: bool) -> Step:
    """The step of a case, plain or prioritised."""
    rows = case.num_rows * case.devices
    tables = ShardedTables([EmbeddingTable("items", rows, case.row_width, RowAdagrad(0.02))], mesh)
    optimizer = optax.sgd(1e-3)
    shape = jax.ShapeDtypeStruct
    layer = (case.width, 4 * case.width), (case.width, case.width)
    params = {
        "first": shape((case.row_width, case.width), jnp.bfloat16),
        "uvqk": [shape(layer[0], jnp.bfloat16)] * case.layers,
        "out": [shape(layer[1], jnp.bfloat16)] * case.layers,
    }
    ids = {"items": shape((case.devices * case.tokens,), jnp.int32)}
    batch = shape((case.devices * case.tokens, case.width), jnp.float32)
    pipeline = PrioritizedStep(tables, projections, optimizer, case.capacity)

    def start(params):
        return init_sharded_state(tables, params, optimizer, key=jax.random.key(0))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        carry = jax.eval_shape(start, params)
        if prioritized:
            carry = jax.eval_shape(pipeline.fetch, carry, ids, batch)
    split = PartitionSpec(AXIS)
    function = (
        pipeline.build(case.capacity)
        if prioritized
        else make_sharded_step(tables, projections, optimizer, {"items": case.capacity["items"]})
    )
    return Step(function, (carry, ids, batch), (_specs(carry), {"items": split}, split))


def _specs(carry: ShardedState | PipelineState) -> Any:
    split, whole = PartitionSpec(AXIS), PartitionSpec()
    if isinstance(carry, ShardedState):
        specs = jax.tree.map(lambda _: whole, carry)
        return specs._replace(tables=jax.tree.map(lambda _: split, carry.tables))
    _, ahead, deferred = jax.tree.map(lambda _: split, carry)
    report = jax.tree.map(lambda _: whole, ahead.plan.report)
    ahead = ahead._replace(plan=ahead.plan._replace(report=report))
    return PipelineState(_specs(carry.state), ahead, deferred)


@dataclass(frozen=True)
class OverlapReport:
    """What to compile.

    Attributes:
      devices: how many H200s, one step for each.
      layers, tokens: see `Case`.
      folder: for the pictures.
      results: where the figures are recorded.
      scratch: records the result of a source tree with uncommitted changes, marked as such.
    """

    devices: tuple[int, ...] = (8, 256)
    layers: int = Case.layers
    tokens: int = Case.tokens
    folder: Path = Path("runs/overlap")
    results: Path = record.RESULTS
    scratch: bool = False


def main(options: OverlapReport) -> None:
    """Prints scores, draws schedules, records both."""
    if reason := aot_available():
        raise SystemExit(f"cannot compile for H200s: {reason}; `make aot` installs what is missing")
    rows, pictures = [], {}
    for devices in options.devices:
        case = Case(devices, tokens=options.tokens, layers=options.layers)
        machine, mesh = Machine.h200(devices), h200_mesh({AXIS: devices})
        for name, prioritized in (("plain", False), ("prioritised", True)):
            step = build(case, mesh, prioritized=prioritized)
            schedule = step.schedule(mesh, XlaOptions().compiler_options())
            rows.append(describe(f"{devices} × H200, {name}", schedule, machine))
            pictures[f"{devices}-{name}"] = draw(schedule, machine)
    report.print_table("All-to-alls beneath products", rows)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (options.folder / f"{name}.png").write_bytes(picture)
    print(f"schedules: {options.folder}/*.png")
    measurements = [
        {"metric": key, "unit": unit, "case": row["step"], "value": row[key]}
        for row in rows
        for key, unit in (("overlap score", "fraction"), ("waiting ms", "ms"), ("sent MB", "MB"))
    ]
    path = record.write(
        "overlap_report", config=asdict(options) | {"folder": None, "results": None},
        measurements=measurements,
        scratch=options.scratch, folder=options.results,
    )  # fmt: skip
    for name, picture in pictures.items():
        path.with_suffix(f".{name}.png").write_bytes(picture)


def describe(name: str, schedule: Schedule, machine: Machine) -> dict[str, Any]:
    """A row of the table."""
    exchanges = schedule.of_kind("all-to-all")
    spans = timeline(schedule, machine)
    waiting = sum(span.seconds for span in spans if span.row == "waiting")
    return {
        "step": name,
        "overlap score": round(schedule.overlap_score(machine, "all-to-all"), 4),
        "sent MB": round(sum(c.sent_bytes for c in exchanges) / 1e6, 1),
        "all-to-all ms": round(1e3 * sum(c.sent_bytes for c in exchanges) / machine.link_bytes, 2),
        "products ms": round(1e3 * sum(p.flops for p in schedule.products) / machine.flops, 2),
        "waiting ms": round(1e3 * waiting, 2),
    }


def draw(schedule: Schedule, machine: Machine) -> bytes:
    """Products, exchanges and waiting along one axis of time, as PNG bytes."""
    rows = {"products": "#2563a8", "all-to-all": "#d9822b", "all-reduce": "#3a9a6b"}
    bars: dict[str, list[tuple[float, float]]] = {name: [] for name in (*rows, "waiting")}
    for span in timeline(schedule, machine):
        bars.setdefault(span.row, []).append((1e3 * span.start, 1e3 * span.seconds))
    colours = rows | {"waiting": "#b8434e"}
    return report.gantt(bars, colours, x="ms, at the rates of the data sheet")


if __name__ == "__main__":
    main(tyro.cli(OverlapReport))
