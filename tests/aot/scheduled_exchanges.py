"""What a scheduled program computes while its all-to-alls are under way."""

import re
from typing import NamedTuple


class Exchange(NamedTuple):
    """One all-to-all of a scheduled program: its result's type, and the products meanwhile."""

    result: str
    products: list[str]


def exchanges(hlo: str) -> list[Exchange]:
    """The asynchronous all-to-alls of the entry computation, in order of their start."""
    bodies = re.findall(r"^%([\w.\-]+) \(.*?\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL)
    with_dot = {name for name, body in bodies if " dot(" in body}
    entry = re.split(r"^ENTRY ", hlo, flags=re.MULTILINE)[1].split("\n}")[0].splitlines()

    def result(line: str) -> str:
        return line.split(" = ")[1].split("{")[0]

    def product(line: str) -> bool:
        called = re.search(r"calls=%([\w.\-]+)", line)
        kernel = "mosaic_gpu" in line and not re.match(r"\(?[su]\d+\[", result(line))
        dot = " dot(" in line or "__cublas" in line or kernel  # what counts pairs is no product
        return dot or (called is not None and called[1] in with_dot)

    found = []
    for first, line in enumerate(entry):
        if start := re.match(r"\s+%(all-to-all-start[\w.\-]*) = ", line):
            done = f"all-to-all-done(%{start[1]})"
            last = next(number for number, other in enumerate(entry) if done in other)
            meanwhile = [result(other) for other in entry[first:last] if product(other)]
            found.append(Exchange(result(entry[last]), meanwhile))
    return found
