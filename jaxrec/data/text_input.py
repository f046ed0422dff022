"""Text files as numbered lines, and the error that says where a file is wrong."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path


class DataFormatError(ValueError):
    """A data file that cannot be read as asked.

    The message holds the file, the line (or row) and field, what was expected, and what to do.

    Attributes:
      path: the file.
      line: line number from 1 (row number for Parquet), or None where the whole file is meant.
      field: the column, key or position at fault, or None.
    """

    def __init__(
        self,
        path: str | Path,
        problem: str,
        *,
        line: int | None = None,
        field: str | None = None,
        line_word: str = "line",
    ):
        where = [str(path)]
        if line is not None:
            where.append(f"{line_word} {line}")
        if field is not None:
            where.append(f"field {field!r}")
        super().__init__(f"{', '.join(where)}: {problem}")
        self.path = Path(path)
        self.line = line
        self.field = field


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Streams (line number from 1, text without the line end) of a UTF-8 file."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataFormatError(
                    path,
                    f"byte {error.start + 1} is not UTF-8; convert the file to UTF-8 first.",
                    line=number,
                ) from error
            yield number, text.rstrip("\r\n")


def csv_rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Streams (number of the line a record ends on, its fields) of a CSV file, quotes undone.

    A blank line is a record without fields.
    """
    reader = csv.reader(f"{text}\n" for _, text in numbered_lines(path))
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataFormatError(path, f"not valid CSV: {error}.", line=reader.line_num) from error
        yield reader.line_num, row


def require_columns(path: str | Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    """Raises `DataFormatError` naming the first wanted column that the file lacks."""
    for column in wanted:
        if column not in found:
            raise DataFormatError(
                path,
                f"there is no column {column!r}; the file has {', '.join(map(repr, found))}. "
                "Check the column names given and that the first line is the header.",
                field=column,
            )


def empty_file(path: str | Path, expected: str) -> DataFormatError:
    """The error for a file that holds no record."""
    return DataFormatError(path, f"the file is empty; expected {expected}.")
