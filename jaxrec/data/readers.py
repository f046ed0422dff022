"""Readers of text formats: one-line-a-user sequences, JSON-lines events and MovieLens ratings.

Every reader streams, numbers users (from 0) and items (from 1) in order of first appearance,
and raises `DataFormatError` with file, line and field. Tables are read by `tables.read_table`.
"""

import json
import re
import warnings
from array import array
from collections.abc import Collection, Iterable, Sequence
from itertools import batched
from pathlib import Path

import numpy as np

from jaxrec.data.interactions import Interactions, TimeUnit, build_interactions
from jaxrec.data.text_input import DataFormatError, empty_file, numbered_lines, require_columns
from jaxrec.data.vocabulary import Numbering, Vocabulary, number_values

_MOVIELENS_COLUMNS: tuple[str, ...] = ("userId", "movieId", "rating", "timestamp")
_LINES_PER_BLOCK = 65_536
_INT64 = np.iinfo(np.int64)


def read_sequences(
    path: str | Path, *, user_column: bool, zero_is_item: bool = False
) -> Interactions:
    """Reads one user a line: item ids in time order, separated by blanks.

    Args:
      path: UTF-8 text. Blank lines are allowed at the end only.
      user_column: whether a line starts with the user's id; otherwise the line number is the id.
      zero_is_item: item id "0" is an error unless this is True, since 0 usually is padding.

    Returns:
      interactions without timestamps; an item that occurs twice in a line is two events.

    Raises:
      DataFormatError: an empty file or line, a user without items or on two lines, an item "0",
        commas as separators.
    """
    users, items = Numbering(first_index=0), Numbering(first_index=1)
    line_of_user, item_index, lengths = array("q"), array("i"), array("q")
    blank_line = None
    for line, text in numbered_lines(path):
        fields = text.split()
        if not fields:
            blank_line = blank_line or line
            continue
        if blank_line is not None:
            raise DataFormatError(
                path, "the line is empty; expected item ids. Remove it.", line=blank_line
            )
        _check_sequence(path, line, text, fields[user_column:], zero_is_item)
        user = fields[0] if user_column else str(line)
        if user in users:
            raise DataFormatError(
                path,
                f"user {user!r} already stands on line {line_of_user[users[user]]}; expected one "
                "line a user. Join the lines, or pass user_column=False if there is no user id.",
                line=line,
                field="user",
            )
        users[user] = len(users)
        line_of_user.append(line)
        item_index.extend(map(items.__getitem__, fields[user_column:]))
        lengths.append(len(fields) - user_column)
    if not users:
        raise empty_file(path, "one user a line")
    user_index = np.repeat(np.arange(len(users), dtype=np.int32), np.array(lengths))
    return build_interactions(
        user_index,
        np.array(item_index, dtype=np.int32),
        None,
        users=users.vocabulary("user"),
        items=items.vocabulary("item"),
        source=str(path),
    )


def _check_sequence(
    path: str | Path, line: int, text: str, items: Sequence[str], zero_is_item: bool
) -> None:
    if "," in text:
        raise DataFormatError(
            path, "found ','; expected ids separated by blanks. Use read_table for CSV.", line=line
        )
    if not items:
        raise DataFormatError(
            path,
            "the user has no items; expected `user item item …`. Remove the line, or pass "
            "user_column=False if lines hold items only.",
            line=line,
            field="items",
        )
    if not zero_is_item and "0" in items:
        raise DataFormatError(
            path,
            "item id 0 usually is padding. Remove the padding, or pass zero_is_item=True if 0 "
            "is a real item.",
            line=line,
            field=f"item {list(items).index('0') + 1}",
        )


def read_events_jsonl(
    path: str | Path, *, types: Collection[str] | None = None, time_unit: TimeUnit = "ms"
) -> Interactions:
    """Reads sessions, one JSON object a line: `{"session":…, "events":[{"aid","ts","type"}]}`.

    Sessions are the users. Events of a session are sorted by time, stably; a session may span
    lines. Repeats of item and time in a session are dropped and counted.

    Args:
      path: UTF-8 JSON lines.
      types: event types to keep (OTTO has clicks, carts, orders); None keeps all, and then
        `type` may be absent.
      time_unit: what `ts` counts; OTTO's files count milliseconds.

    Raises:
      DataFormatError: an empty file, broken JSON, a missing key or one of the wrong type (named
        with the event's position), no event of the wanted types.
    """
    if isinstance(types, str):
        raise ValueError(f"types must be a collection of names; pass [{types!r}].")
    users, items = Numbering(first_index=0), Numbering(first_index=1)
    user_index, item_index, times = array("i"), array("i"), array("q")
    rows_filtered, found_types = 0, set()
    for line, text in numbered_lines(path):
        if not text.strip():
            continue
        session, events = _parse_session(path, line, text)
        for position, event in enumerate(events):
            item, time = _parse_event(path, line, position, event)
            if types is not None:
                field = f"events[{position}].type"
                kind = _raw_id(path, line, _required(path, line, event, "type", field), field)
                found_types.add(kind)
                if kind not in types:
                    rows_filtered += 1
                    continue
            user_index.append(users[session])
            item_index.append(items[item])
            times.append(time)
    if not users:
        if rows_filtered:
            raise DataFormatError(
                path,
                f"no event has a type of {sorted(types or ())}; the file has "
                f"{sorted(found_types)}.",
                field="type",
            )
        raise empty_file(path, "one session with events a line")
    return build_interactions(
        np.array(user_index, dtype=np.int32),
        np.array(item_index, dtype=np.int32),
        np.array(times, dtype=np.int64),
        users=users.vocabulary("user"),
        items=items.vocabulary("item"),
        source=str(path),
        rows_filtered=rows_filtered,
        time_unit=time_unit,
    )


def _parse_session(path: str | Path, line: int, text: str) -> tuple[str, list]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataFormatError(
            path, f"not valid JSON ({error}); expected one object a line.", line=line
        ) from error
    if not isinstance(record, dict):
        raise DataFormatError(
            path, f"expected an object with session and events, found {text[:40]!r}.", line=line
        )
    session = _raw_id(path, line, _required(path, line, record, "session", "session"), "session")
    events = _required(path, line, record, "events", "events")
    if not isinstance(events, list):
        raise DataFormatError(
            path, f"expected a list of events, found {events!r:.40}.", line=line, field="events"
        )
    return session, events


def _parse_event(path: str | Path, line: int, position: int, event: object) -> tuple[str, int]:
    where = f"events[{position}]"
    if not isinstance(event, dict):
        raise DataFormatError(
            path,
            f"expected an object with aid and ts, found {event!r:.40}.",
            line=line,
            field=where,
        )
    item = _raw_id(path, line, _required(path, line, event, "aid", f"{where}.aid"), f"{where}.aid")
    time = _required(path, line, event, "ts", f"{where}.ts")
    if type(time) is not int or not _INT64.min <= time <= _INT64.max:
        raise DataFormatError(
            path, f"expected a whole number, found {time!r:.40}.", line=line, field=f"{where}.ts"
        )
    return item, time


def _required(path: str | Path, line: int, record: dict, key: str, field: str) -> object:
    if key not in record:
        raise DataFormatError(
            path, f"the key is missing; found {sorted(record)}.", line=line, field=field
        )
    return record[key]


def _raw_id(path: str | Path, line: int, value: object, field: str) -> str:
    if type(value) is int or (type(value) is str and value):
        return str(value)
    raise DataFormatError(
        path, f"expected a whole number or a string, found {value!r:.40}.", line=line, field=field
    )


def read_movielens(path: str | Path, *, min_rating: float | int | None = None) -> Interactions:
    """Reads MovieLens ratings: CSV with a header, or `user::movie::rating::timestamp` lines.

    Args:
      path: `ratings.csv` or `ratings.dat`; the form is told from the first line.
      min_rating: leaves out ratings below this (0.5 to 5); None keeps every rating as an event.

    Raises:
      DataFormatError: an empty file, a missing column, a field that is not a number, no rating
        of at least `min_rating`.
    """
    lines = numbered_lines(path)
    _, first = next(lines, (1, ""))
    if not first.strip():
        raise empty_file(path, "a header userId,movieId,rating,timestamp or `::` lines")
    separator = "::" if "::" in first else ","
    if separator == "::":
        header, lines = list(_MOVIELENS_COLUMNS), numbered_lines(path)
    else:
        header = [name.strip() for name in first.split(",")]
        require_columns(path, _MOVIELENS_COLUMNS, header)
    blocks = [
        _parse_ratings(path, block, header, separator) for block in batched(lines, _LINES_PER_BLOCK)
    ]
    rows = np.concatenate(blocks) if blocks else np.empty(0, dtype=_rating_dtype())
    if not len(rows):
        raise empty_file(path, "ratings below the header")
    kept = rows if min_rating is None else rows[rows["rating"] >= min_rating]
    if not len(kept):
        raise DataFormatError(
            path,
            f"no rating is at least min_rating={min_rating}; the highest is "
            f"{rows['rating'].max():g}.",
            field="rating",
        )
    user_index, users = number_values(kept["userId"], first_index=0)
    item_index, items = number_values(kept["movieId"], first_index=1)
    return build_interactions(
        user_index,
        item_index,
        np.ascontiguousarray(kept["timestamp"]),
        users=Vocabulary.create("user", map(str, users.tolist()), first_index=0),
        items=Vocabulary.create("item", map(str, items.tolist()), first_index=1),
        source=str(path),
        rows_filtered=len(rows) - len(kept),
    )


def _rating_dtype() -> np.dtype:
    return np.dtype([(name, "f8" if name == "rating" else "i8") for name in _MOVIELENS_COLUMNS])


def _parse_ratings(
    path: str | Path, block: Iterable[tuple[int, str]], header: list[str], separator: str
) -> np.ndarray:
    """Parses many lines at once; only if that fails is each looked at, to say where."""
    numbered = [(line, text) for line, text in block if text.strip()]
    texts = [text.replace("::", ",") if separator == "::" else text for _, text in numbered]
    if not texts:
        return np.empty(0, dtype=_rating_dtype())
    columns = [header.index(name) for name in _MOVIELENS_COLUMNS]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # "1.5" as an integer
            return np.loadtxt(
                texts, delimiter=",", dtype=_rating_dtype(), usecols=columns, comments=None, ndmin=1
            )
    except (ValueError, DeprecationWarning) as error:
        for line, text in numbered:
            _check_rating(path, line, text.split(separator), header)
        raise DataFormatError(path, f"cannot parse lines {numbered[0][0]}…: {error}") from error


def _check_rating(path: str | Path, line: int, fields: list[str], header: list[str]) -> None:
    for name in _MOVIELENS_COLUMNS:
        place = header.index(name)
        if place >= len(fields):
            raise DataFormatError(
                path,
                f"the field is missing; expected {len(header)} fields, found {len(fields)}.",
                line=line,
                field=name,
            )
        number = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?" if name == "rating" else r"[+-]?\d{1,18}"
        if not re.fullmatch(number, fields[place].strip()):
            wanted = "a number" if name == "rating" else "a whole number"
            raise DataFormatError(
                path, f"expected {wanted}, found {fields[place]!r}.", line=line, field=name
            )
