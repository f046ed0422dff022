"""What parsers of short texts tell people: the place, what was found there, what was expected."""

import difflib
import re
from collections.abc import Collection


def caret_message(text: str, at: int, what: str, expected: str) -> str:
    """The message with the part of the text around column `at` and a caret under the column."""
    begin, end = max(0, at - 60), at + 40
    shown = re.sub(r"\s", " ", text[begin:end])
    left, right = "…" if begin else "", "…" if end < len(text) else ""
    caret = " " * (at - begin + len(left)) + "^"
    return f"column {at + 1}: {what}; expected {expected}\n  {left}{shown}{right}\n  {caret}"


def unknown_name(name: str, known: Collection[str], kind: str = "name") -> tuple[str, str]:
    """What was found and what was expected, with the closest known name first."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {kind} {name!r}{hint}", "one of " + (", ".join(sorted(known)) or "no names")
