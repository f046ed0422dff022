"""What embedding tables are, and where their rows stand on the devices.

Tables of one width, dtype, optimizer and memory form a *group*: one array, one exchange, one
update. Row p of a group's array is on device p // (number of rows / S). A table's rows are dealt
out to `virtual_shards` (W) parts, neighbouring ids far apart, so that ids numbered by popularity
burden all devices alike; every device owns W / S parts. The order of rows depends on W alone, so a
checkpoint restores on any number of devices that divides W.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxrec.ops.row_optimizers import RowAdagrad, RowOptimizer
from jaxrec.typing import PADDING_ID

MAX_ROWS = 2**30  # i32 counts rows, and places beyond them
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class EmbeddingTable:
    """One table of V rows.

    Attributes:
      name: of the table.
      num_rows: V; ids count from 0 up to V - 1.
      dim: width of a row.
      optimizer: of its rows.
      dtype: "float32" or "bfloat16" rows; moments are f32 either way. An update of a bf16 row that
        is smaller than half its last bit (2⁻⁹ of the value) is lost by rounding.
      memory: "device", or "pinned_host" for tables beyond the devices' memory: see `read_rows`.
        Host memory is tested on CPU devices alone: a GPU that is not there has no host memory to
        compile for.
      std: of the rows' normal distribution at the start; row `padding_id` is zeros.
      padding_id: an id that means no row: it gives zeros and costs nothing; None for no such id.

    Raises:
      ValueError: a number or a name out of range.
    """

    name: str
    num_rows: int
    dim: int
    optimizer: RowOptimizer = field(default_factory=RowAdagrad)
    dtype: Literal["float32", "bfloat16"] = "float32"
    memory: Literal["device", "pinned_host"] = "device"
    std: float = 0.02
    padding_id: int | None = PADDING_ID

    def __post_init__(self):
        for field_name in ("num_rows", "dim"):
            if getattr(self, field_name) < 1:
                value = getattr(self, field_name)
                raise ValueError(
                    f"{field_name} of table {self.name!r} is {value}; expected 1 or more"
                )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"dtype of table {self.name!r} is {self.dtype!r}; expected float32 or bfloat16"
            )
        if self.memory not in ("device", "pinned_host"):
            raise ValueError(
                f"memory of table {self.name!r} is {self.memory!r}; expected device or pinned_host"
            )

    def present(self, ids: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether an id is no padding."""
        return jnp.ones(ids.shape, bool) if self.padding_id is None else ids != self.padding_id

    def inside(self, ids: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether an id is one of the table."""
        return (ids >= 0) & (ids < self.num_rows)


@dataclass(frozen=True)
class TableGroup:
    """Tables in one array.

    Attributes:
      tables: alike in width, dtype, optimizer and memory.
      virtual_shards: W.
    """

    tables: tuple[EmbeddingTable, ...]
    virtual_shards: int

    @property
    def name(self) -> str:
        """The tables' names."""
        return "+".join(table.name for table in self.tables)

    @property
    def on_host(self) -> bool:
        """Whether rows are in host memory."""
        return self.tables[0].memory != "device"

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.tables[0].dim

    @property
    def optimizer(self) -> RowOptimizer:
        """Of all rows."""
        return self.tables[0].optimizer

    @property
    def dtype(self) -> Any:
        """Of rows."""
        return jnp.dtype(self.tables[0].dtype)

    @property
    def part_rows(self) -> int:
        """Rows of one of the W parts."""
        return sum(self._rows_a_part(table) for table in self.tables)

    @property
    def num_rows(self) -> int:
        """Rows of the array; up to W - 1 a table more than the tables have."""
        return self.part_rows * self.virtual_shards

    def row_ids(self, table: EmbeddingTable, ids: Int[Array, "*shape"]) -> Int32[Array, "*shape"]:
        """The array's row of each of a table's ids, `num_rows` for padding and ids outside."""
        there = table.present(ids) & table.inside(ids)
        return jnp.where(there, self._row(table, ids), self.num_rows).astype(jnp.int32)

    def is_padding(self, rows: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether an array's row is some table's padding row."""
        padding = jnp.zeros(rows.shape, bool)
        for table in self.tables:
            if table.padding_id is not None and 0 <= table.padding_id < table.num_rows:
                padding |= rows == self._row(table, jnp.int32(table.padding_id))
        return padding

    def rows_of(self, table: EmbeddingTable) -> Int32[Array, "V"]:
        """The array's row of every id of a table."""
        return self._row(table, jnp.arange(table.num_rows, dtype=jnp.int32))

    def stds(self, rows: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The standard deviation that an array's rows start with."""
        firsts = jnp.array([self._first(table) for table in self.tables])
        table = jnp.searchsorted(firsts, rows % self.part_rows, side="right") - 1
        return jnp.array([table.std for table in self.tables], jnp.float32)[table]

    def _row(self, table: EmbeddingTable, ids: Array) -> Array:
        part = (ids % self.virtual_shards) * self._step % self.virtual_shards
        return part * self.part_rows + self._first(table) + ids // self.virtual_shards

    @property
    def _step(self) -> int:
        """Parts between those of neighbouring ids: the multiple of the golden ratio that is
        nearest and visits all parts, so any stretch of ids covers the devices evenly.
        """
        wanted = round(self.virtual_shards * GOLDEN_RATIO)
        good = [
            n for n in range(1, self.virtual_shards + 1) if math.gcd(n, self.virtual_shards) == 1
        ]
        return min(good, key=lambda n: abs(n - wanted))

    def _rows_a_part(self, table: EmbeddingTable) -> int:
        return -(-table.num_rows // self.virtual_shards)

    def _first(self, table: EmbeddingTable) -> int:
        names = [other.name for other in self.tables]
        before = self.tables[: names.index(table.name)]
        return sum(self._rows_a_part(other) for other in before)


def group_tables(tables: Sequence[EmbeddingTable], virtual_shards: int) -> tuple[TableGroup, ...]:
    """Tables that can share an array and an exchange, in the order of their first.

    Raises:
      ValueError: no table, a name twice, or a table of more rows than i32 counts.
    """
    names = [table.name for table in tables]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tables are named {names}; expected at least one, each name once")
    alike: dict[Any, list[list[EmbeddingTable]]] = {}
    for table in tables:
        key = (table.dim, table.dtype, table.optimizer, table.memory)
        lists = alike.setdefault(key, [[]])
        if TableGroup((*lists[-1], table), virtual_shards).num_rows > MAX_ROWS:
            lists.append([])
        lists[-1].append(table)
    groups = [TableGroup(tuple(same), virtual_shards) for lists in alike.values() for same in lists]
    for group in groups:
        if group.num_rows > MAX_ROWS:
            raise ValueError(
                f"table {group.name} takes {group.num_rows} rows; row numbers are i32, so a table "
                f"has at most {MAX_ROWS}. Hash its ids to fewer rows, or to several tables."
            )
    return tuple(group for group in groups if group.tables)
