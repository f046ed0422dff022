"""Comparing the configuration of a checkpoint with the present one."""

import json
from collections.abc import Mapping
from typing import Any


class ConfigMismatch(ValueError):  # noqa: N818 - names what happened, as users will search it
    """A checkpoint was made with another configuration; the message lists every difference."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}; values as JSON would return them."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.loads(json.dumps(value))
    return flat


def config_differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: tuple[str, ...] = ()
) -> list[str]:
    """One line for every field that differs, unless it or a parent is in `may_differ`.

    A field that one side lacks and that is None on the other is the same: that is how an option
    reads that came later.
    """
    old, new = flatten(saved), flatten(now)

    def free(path: str) -> bool:
        return any(path == name or path.startswith(f"{name}.") for name in may_differ)

    lines = []
    for path in sorted(old.keys() | new.keys()):
        if free(path) or old.get(path) == new.get(path):
            continue
        before = repr(old[path]) if path in old else "absent"
        after = repr(new[path]) if path in new else "absent"
        lines.append(f"{path}: saved {before}, now {after}")
    return lines


def check_same_config(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: tuple[str, ...] = ()
) -> None:
    """Raises `ConfigMismatch` if the configurations differ."""
    lines = config_differences(saved, now, may_differ)
    if lines:
        raise ConfigMismatch(
            "the checkpoint was made with another configuration:\n  "
            + "\n  ".join(lines)
            + "\nUse the saved values, or start a new run in another folder."
        )
