"""Reader of Parquet and CSV tables with any column names (needs polars)."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32, Int64

from jaxrec.data.interactions import Interactions, TimeUnit, build_interactions
from jaxrec.data.text_input import (
    DataFormatError,
    csv_rows,
    empty_file,
    require_columns,
)
from jaxrec.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class ColumnMap:
    """Which column of a table holds what.

    Attributes:
      user: column of user ids; integers or strings.
      item: column of item ids; integers or strings.
      timestamp: column of times: whole numbers in `time_unit`, dates or datetimes. None keeps
        the file's order.
      rating: column of ratings, needed for `min_rating` only.
      min_rating: leaves out rows rated below this.
      time_unit: what whole-number times count.
    """

    user: str
    item: str
    timestamp: str | None = None
    rating: str | None = None
    min_rating: float | int | None = None
    time_unit: TimeUnit = "s"

    def __post_init__(self):
        if self.min_rating is not None and self.rating is None:
            raise ValueError(
                f"min_rating={self.min_rating} needs the rating column: pass rating=…."
            )

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        optional = (self.timestamp, self.rating)
        return [self.user, self.item, *(name for name in optional if name is not None)]


def read_table(path: str | Path, *, columns: ColumnMap) -> Interactions:
    """Reads a `.parquet` or `.csv` file; only the mapped columns are loaded.

    Args:
      path: told apart by suffix; CSV needs a header line.
      columns: which column holds what.

    Raises:
      DataFormatError: an empty table, a missing column, an empty id, a time or rating that is
        not a number, a line with too many fields, no row of at least `min_rating`.
      ValueError: another suffix.
      ImportError: polars is not installed.
    """
    frame = _load(path, columns)
    if frame.height == 0:
        raise empty_file(path, "rows below the header" if _is_csv(path) else "rows")
    for name in (columns.user, columns.item):
        _require_values(
            path, name, _is_blank(frame[name]), "an id, found nothing; fill it or remove it"
        )
    timestamps, time_unit = _as_times(path, columns, frame)
    keep = _well_rated(path, columns, frame)
    rows_filtered = 0
    if keep is not None:
        rows_filtered = int((~keep).sum())
        frame = frame.filter(keep)
        timestamps = None if timestamps is None else timestamps[keep]
    user_index, users = _number_ids(frame[columns.user], "user", first_index=0)
    item_index, items = _number_ids(frame[columns.item], "item", first_index=1)
    return build_interactions(
        user_index,
        item_index,
        timestamps,
        users=users,
        items=items,
        source=str(path),
        rows_filtered=rows_filtered,
        time_unit=time_unit,
    )


def _is_csv(path: str | Path) -> bool:
    return Path(path).suffix == ".csv"


def _load(path: str | Path, columns: ColumnMap) -> "pl.DataFrame":
    try:
        import polars as pl
    except ImportError as error:
        raise ImportError("read_table needs polars: install jaxrec[data].") from error
    suffix = Path(path).suffix
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path}: expected a .csv or .parquet file, found suffix {suffix!r}.")
    try:
        if suffix == ".csv":
            # Text first: the cast below then can say which line is wrong.
            lazy = pl.scan_csv(path, infer_schema=False)
        else:
            lazy = pl.scan_parquet(path)
        require_columns(path, columns.names, lazy.collect_schema().names())
        return lazy.select(list(dict.fromkeys(columns.names))).collect()
    except pl.exceptions.NoDataError as error:
        raise empty_file(path, "a header and rows") from error
    except pl.exceptions.ComputeError as error:
        if suffix == ".csv":
            _check_lines(path)
        raise DataFormatError(path, f"not a readable {suffix[1:]} file: {error}") from error


def _check_lines(path: str | Path) -> None:
    """Raises for the first line that is not UTF-8 or has more fields than the header."""
    rows = csv_rows(path)
    _, header = next(rows)
    for line, fields in rows:
        if len(fields) > len(header):
            raise DataFormatError(
                path,
                f"expected {len(header)} fields, found {len(fields)}. Quote values with commas.",
                line=line,
            )


def _is_blank(series: "pl.Series") -> np.ndarray:
    """Where there is no id: null or empty text."""
    import polars as pl

    return (series.cast(pl.String).fill_null("") == "").to_numpy()


def _require_values(path: str | Path, name: str, bad: np.ndarray, problem: str) -> None:
    """Raises for the first bad row: its line in a CSV (below the header), its row in Parquet."""
    if not bad.any():
        return
    row, word = int(bad.argmax()) + 1, "row"
    if _is_csv(path):
        row, word = next(line for line, _ in islice(csv_rows(path), row, None)), "line"
    raise DataFormatError(path, f"expected {problem}.", line=row, field=name, line_word=word)


def _as_numbers(path: str | Path, name: str, series: "pl.Series") -> np.ndarray:
    """A column as float64; text is parsed, anything but numbers is an error."""
    import polars as pl

    if not (series.dtype.is_numeric() or series.dtype == pl.String):
        raise DataFormatError(path, f"expected numbers, found {series.dtype}.", field=name)
    numbers = series.cast(pl.Float64, strict=False)
    bad = (numbers.is_null() | numbers.is_nan()).to_numpy()
    _require_values(path, name, bad, f"a number, found {_first(series, bad)}")
    return numbers.to_numpy()


def _first(series: "pl.Series", bad: np.ndarray) -> str:
    value = series[int(bad.argmax())]
    return "nothing" if value is None else repr(value)


def _as_times(
    path: str | Path, columns: ColumnMap, frame: "pl.DataFrame"
) -> tuple[Int64[np.ndarray, "n"] | None, TimeUnit]:
    """The time column as whole numbers, and what they count."""
    import polars as pl

    name = columns.timestamp
    if name is None:
        return None, columns.time_unit
    series = frame[name]
    time_unit = columns.time_unit
    if series.dtype.is_temporal() and series.dtype not in (pl.Time, pl.Duration):
        times, time_unit = series.cast(pl.Datetime("us")).cast(pl.Int64), "us"
    elif series.dtype.is_integer() or series.dtype == pl.String:
        times = series.cast(pl.Int64, strict=False)
    else:
        raise DataFormatError(
            path,
            f"expected whole numbers, dates or datetimes, found {series.dtype}. Cast it first.",
            field=name,
        )
    bad = times.is_null().to_numpy()
    _require_values(path, name, bad, f"a whole number, found {_first(series, bad)}")
    return times.to_numpy(), time_unit


def _well_rated(path: str | Path, columns: ColumnMap, frame: "pl.DataFrame") -> np.ndarray | None:
    """The rows to keep by rating; None keeps all."""
    if columns.min_rating is None or columns.rating is None:
        return None
    ratings = _as_numbers(path, columns.rating, frame[columns.rating])
    keep = ratings >= columns.min_rating
    if not keep.any():
        raise DataFormatError(
            path,
            f"no rating is at least min_rating={columns.min_rating}; the highest is "
            f"{ratings.max():g}.",
            field=columns.rating,
        )
    return keep


def _number_ids(
    series: "pl.Series", kind: str, *, first_index: int
) -> tuple[Int32[np.ndarray, "n"], Vocabulary]:
    """Numbers ids in order of first appearance."""
    import polars as pl

    raw = series.cast(pl.String)
    distinct = raw.unique(maintain_order=True)
    numbers = pl.int_range(first_index, first_index + len(distinct), dtype=pl.Int32, eager=True)
    index = raw.replace_strict(distinct, numbers, return_dtype=pl.Int32).to_numpy()
    return index, Vocabulary.create(kind, distinct.to_list(), first_index=first_index)
