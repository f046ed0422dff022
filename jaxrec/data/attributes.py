"""Item attributes aligned to an item vocabulary, ready for a filter index."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxrec.data.text_input import DataFormatError, csv_rows, empty_file, require_columns
from jaxrec.data.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class ItemAttributes:
    """Values of each feature for each item.

    Attributes:
      values: feature name → one tuple of strings per item number; entry 0 (padding) is empty,
        and so are the entries of items without values. Values of an item are all different.
      items: the vocabulary that numbers the entries.
      unknown_items: items of the source that the vocabulary lacks; they were left out.
    """

    values: Mapping[str, Sequence[tuple[str, ...]]]
    items: Vocabulary
    unknown_items: int = 0

    def __post_init__(self):
        for name, rows in self.values.items():
            if len(rows) != self.items.size + 1:
                raise ValueError(
                    f"feature {name!r} has {len(rows)} entries; expected {self.items.size + 1}: "
                    "one for padding and one an item."
                )

    def features(self) -> dict[str, list[list[str]]]:
        """`{feature: [values of item 1, values of item 2, …]}`, as `BloomIndex.build` takes it."""
        return {name: [list(row) for row in rows[1:]] for name, rows in self.values.items()}

    def aligned_to(self, items: Vocabulary) -> "ItemAttributes":
        """The same attributes for another numbering, such as the items left after filtering."""
        old_index = [
            self.items.index_of(raw) if raw in self.items else 0 for raw in items.ids.tolist()
        ]
        values = {
            name: [(), *(rows[old] for old in old_index)] for name, rows in self.values.items()
        }
        return ItemAttributes(values, items, self.unknown_items)


@dataclass
class _Collector:
    """Gathers values item by item; repeats of a value are dropped, order is kept."""

    items: Vocabulary
    names: Sequence[str]
    rows: dict[str, list[dict[str, None]]] = field(init=False)
    unknown: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.rows = {name: [{} for _ in range(self.items.size + 1)] for name in self.names}

    def add(self, raw_id: str, name: str, values: Sequence[str]) -> None:
        if raw_id in self.items:
            self.rows[name][self.items.index_of(raw_id)].update(dict.fromkeys(values))
        else:
            self.unknown.add(raw_id)

    def result(self) -> ItemAttributes:
        values = {name: [tuple(row) for row in rows] for name, rows in self.rows.items()}
        return ItemAttributes(values, self.items, len(self.unknown))


def read_item_attributes_json(
    path: str | Path, items: Vocabulary, *, feature: str = "attribute"
) -> ItemAttributes:
    """Reads `{item id: [attribute, …]}`; attributes are numbers or strings.

    Args:
      path: one JSON object; loaded whole.
      items: the numbering to align to. Its items that the file lacks get no values; items of
        the file that it lacks are counted.
      feature: what to call the attributes.

    Raises:
      DataFormatError: an empty file, broken JSON, another shape (names the item).
    """
    text = Path(path).read_text(encoding="utf-8-sig")
    if not text.strip():
        raise empty_file(path, "an object {item id: [attribute, …]}")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataFormatError(path, f"not valid JSON: {error.msg}.", line=error.lineno) from error
    if not isinstance(record, dict):
        raise DataFormatError(path, f"expected an object, found {type(record).__name__}.")
    collector = _Collector(items, [feature])
    for raw_id, values in record.items():
        if not isinstance(values, list) or not all(type(v) in (int, str) for v in values):
            raise DataFormatError(
                path,
                f"expected a list of whole numbers or strings, found {values!r:.60}.",
                field=raw_id,
            )
        collector.add(raw_id, feature, [str(value) for value in values])
    return collector.result()


def read_item_attributes_csv(
    path: str | Path,
    items: Vocabulary,
    *,
    item_column: str,
    features: Mapping[str, str | None],
) -> ItemAttributes:
    """Reads attributes from the columns of a CSV file with a header.

    Args:
      path: UTF-8 CSV, streamed. An item on several lines gets the values of all of them.
      items: the numbering to align to, as for `read_item_attributes_json`.
      item_column: the column of item ids.
      features: column → separator of its values, such as `{"genres": "|"}`; None means one
        value a line. Values are stripped, empty ones are left out.

    Raises:
      DataFormatError: an empty file, a missing column, a line with another number of fields.
    """
    if not features:
        raise ValueError('features is empty; name a column, such as features={"genres": "|"}.')
    rows = csv_rows(path)
    _, header = next(rows, (1, []))
    if not header:
        raise empty_file(path, f"a header with {item_column!r}")
    require_columns(path, [item_column, *features], header)
    item_place = header.index(item_column)
    places = {name: header.index(name) for name in features}
    collector = _Collector(items, list(features))
    line = None
    for line, fields in rows:
        if not fields:
            continue
        if len(fields) != len(header):
            raise DataFormatError(
                path,
                f"expected {len(header)} fields, found {len(fields)}. Quote values with commas.",
                line=line,
            )
        for name, separator in features.items():
            text = fields[places[name]]
            parts = text.split(separator) if separator else [text]
            values = [part.strip() for part in parts if part.strip()]
            collector.add(fields[item_place].strip(), name, values)
    if line is None:
        raise empty_file(path, "rows below the header")
    return collector.result()
