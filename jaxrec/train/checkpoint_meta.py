"""What stands beside the arrays of a checkpoint: JSON with a checksum, and what it tells."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxrec.functional import leaf_names
from jaxrec.typing import PyTree


def sealed(**meta: Any) -> dict[str, Any]:
    """As JSON would return it, with a checksum of its own."""
    plain = json.loads(json.dumps(meta))
    return {**plain, "crc32": _crc32(plain)}


def unsealed(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `sealed` was given; None if it is not what it was."""
    plain = {name: value for name, value in meta.items() if name != "crc32"}
    return plain if meta.get("crc32") == _crc32(plain) else None


def other_arrays(saved: Mapping[str, list], abstract_state: PyTree) -> list[str]:
    """A line for every array of another dtype or shape than asked for, or that one side lacks.

    Args:
      saved: [dtype, shape, …] by name, as `fingerprints` gives.
    """
    leaves = jax.tree.leaves(abstract_state)
    wanted = {
        name: [str(leaf.dtype), list(leaf.shape)]
        for name, leaf in zip(leaf_names(abstract_state), leaves, strict=True)
    }
    lines = []
    for name in sorted(wanted.keys() | saved.keys()):
        before = "absent" if name not in saved else f"{saved[name][0]}{saved[name][1]}"
        now = "absent" if name not in wanted else f"{wanted[name][0]}{wanted[name][1]}"
        if before != now:
            lines.append(f"{name}: saved {before}, asked for {now}")
    return lines


def _crc32(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
