"""What a scheduled program computes while its collectives are under way, and whether that suffices.

Read from the text of a compiled program: each asynchronous collective has a start and a done, and
the matrix products between them are what it can hide beneath. Collectives that are under way
together follow each other on the link, in the order of their starts.

    report = compile_for_h200(step, …, mesh=h200_mesh({"data": 8}))
    schedule = Schedule.read(report.hlo_text)
    schedule.overlap_score(Machine.h200(8))         # 1.0: nobody waits for an all-to-all

Products alone take time, at the full rate of the tensor cores, so a score is a lower bound: what
lies between them (normalisation, sorting, kernels that tell no operations) hides something as well.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

COLLECTIVES = (
    "all-to-all", "ragged-all-to-all", "all-reduce", "all-gather", "reduce-scatter",
    "collective-permute",
)  # fmt: skip
_ITEM_BYTES = {"pred": 1.0, "s4": 0.5, "u4": 0.5, "bf16": 2.0, "c64": 8.0, "c128": 16.0}
_ARRAY = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_SYMMETRIC = "S(1)"  # XLA's number of the memory for collectives
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Machine:
    """Rates that tell how long a product or an exchange takes.

    Attributes:
      flops: multiply-adds count two; per second and device.
      link_bytes: that a device sends per second, to all others together.
    """

    flops: float
    link_bytes: float

    @classmethod
    def h200(cls, num_devices: int) -> "Machine":
        """NVIDIA's published rates: dense bf16; NVLink within 8 devices, 400 Gb/s each beyond."""
        return cls(989e12, 450e9 if num_devices <= 8 else 50e9)


@dataclass(frozen=True)
class Product:
    """A step of the schedule with matrix products in it.

    Attributes:
      place: in the schedule.
      result: its type, such as "bf16[32768,1024]".
      flops: 0 for a kernel that does not tell.
    """

    name: str
    place: int
    result: str
    flops: float


@dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      start, done: places in the schedule; the same if it is synchronous.
      result: its type.
      num_bytes: of the result.
      group_size: devices that take part; 0 if the program does not say.
      symmetric: whether what is sent and what is received are in symmetric memory, as copy engines
        need it.
    """

    name: str
    kind: str
    start: int
    done: int
    result: str
    num_bytes: float
    group_size: int = 0
    symmetric: bool = False

    @property
    def sent_bytes(self) -> float:
        """That leave each device: in an all-to-all all but its own part, in an all-reduce twice."""
        others = 1 - 1 / self.group_size if self.group_size else 1.0
        return self.num_bytes * others * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Schedule:
    """Products and collectives of a program's entry computation, in the order of their start."""

    products: tuple[Product, ...]
    collectives: tuple[Collective, ...]
    length: int

    @classmethod
    def read(cls, hlo: str) -> "Schedule":
        """The schedule of a compiled program, from its text.

        Raises:
          ValueError: the text is not that of a scheduled program.
        """
        if "is_scheduled=true" not in hlo.split("\n", 1)[0]:
            raise ValueError(
                "this program has no schedule; expected the text of a compiled one, such as "
                "jitted.lower(…).compile().as_text()"
            )
        computations, entry = _computations(hlo)
        flops = _Flops(computations)
        lines = computations[entry]
        products, collectives = [], []
        places = {name: place for place, name in enumerate(lines)}
        finished = {_operands(i.rest)[0]: n for n, i in lines.items() if i.opcode.endswith("-done")}
        for name, own in lines.items():
            kind = own.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                last = finished.get(name, name)
                result = lines[last].type if own.opcode.endswith("-start") else own.type
                collectives.append(
                    Collective(
                        name, kind, places[name], places[last], _short(result),
                        _num_bytes(result), _group_size(own.rest), _in_symmetric_memory(own.type),
                    )
                )  # fmt: skip
            elif (work := flops.of(own, lines)) is not None:
                products.append(Product(name, places[name], _short(own.type), work))
        return cls(tuple(products), tuple(collectives), len(lines))

    def of_kind(self, *kinds: str) -> tuple[Collective, ...]:
        """The collectives of these kinds, all if none is named."""
        return tuple(c for c in self.collectives if not kinds or c.kind in kinds)

    def beside(self, collective: Collective) -> tuple[Product, ...]:
        """Products between its start and its done."""
        first, last = collective.start, collective.done
        return tuple(p for p in self.products if first < p.place < last)

    def hidden(self, machine: Machine) -> Mapping[str, float]:
        """Of each collective the part of its time, 0 to 1, in which nobody waits for it."""
        waiting = {span.name: span.seconds for span in timeline(self, machine) if span.waits}
        seconds = {c.name: c.sent_bytes / machine.link_bytes for c in self.collectives}
        return {
            name: 1 - min(1.0, waiting.get(name, 0.0) / own) if own else 1.0
            for name, own in seconds.items()
        }

    def overlap_score(self, machine: Machine, *kinds: str) -> float:
        """Bytes that nobody waits for, of all that collectives of these kinds send; 0 to 1.

        Args:
          machine: rates.
          kinds: such as "all-to-all"; all if none is named.
        """
        hidden, chosen = self.hidden(machine), self.of_kind(*kinds)
        total = sum(c.sent_bytes for c in chosen)
        return sum(c.sent_bytes * hidden[c.name] for c in chosen) / total if total else 1.0


@dataclass(frozen=True)
class Span:
    """Something that takes time.

    Attributes:
      name: of the product or collective.
      row: "products", "waiting" for the collective, or its kind.
      start, seconds: from the start of the step.
    """

    name: str
    row: str
    start: float
    seconds: float

    @property
    def waits(self) -> bool:
        """Nothing is computed meanwhile."""
        return self.row == "waiting"


def timeline(schedule: Schedule, machine: Machine) -> list[Span]:
    """When everything would run at these rates, if nothing else took time.

    Collectives follow each other on the link; computation stops at a done until it is done.
    """
    products = {product.place: product for product in schedule.products}
    starts = {collective.start: collective for collective in schedule.collectives}
    dones = {collective.done: collective for collective in schedule.collectives}
    spans, ends = [], {}
    now = link = 0.0
    for place in range(schedule.length):
        if product := products.get(place):
            spans.append(Span(product.name, "products", now, product.flops / machine.flops))
            now += product.flops / machine.flops
        if collective := starts.get(place):
            seconds = collective.sent_bytes / machine.link_bytes
            spans.append(Span(collective.name, collective.kind, max(now, link), seconds))
            ends[collective.name] = link = max(now, link) + seconds
        if (collective := dones.get(place)) and ends[collective.name] > now:
            spans.append(Span(collective.name, "waiting", now, ends[collective.name] - now))
            now = ends[collective.name]
    return spans


@dataclass(frozen=True)
class _Instruction:
    type: str
    opcode: str
    rest: str


def _computations(hlo: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Instructions by name, of each computation by name; and the name of the entry."""
    found: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", {}
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif own := _INSTRUCTION.match(line):
            type_, rest = _split_type(line[own.end() :])
            opcode, _, rest = rest.partition("(")
            current[own[1]] = _Instruction(type_, opcode.strip(), rest)
    return found, entry


def _split_type(text: str) -> tuple[str, str]:
    """A type, which may be a tuple, and what follows it."""
    if not text.startswith("("):
        type_, _, rest = text.partition(" ")
        return type_, rest
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :].lstrip()
    raise ValueError(f"a type without its end: {text[:80]}")


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.split("), ", 1)[0])


def _short(type_: str) -> str:
    """A type without its layout."""
    return _LAYOUT.sub("", type_)


def _in_symmetric_memory(type_: str) -> bool:
    layouts = _LAYOUT.findall(type_)
    return bool(layouts) and all(_SYMMETRIC in layout for layout in layouts)


def _arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(_short(type_))
    ]


def _num_bytes(type_: str) -> float:
    def item(dtype: str) -> float:
        digits = re.search(r"\d+", dtype)
        return _ITEM_BYTES.get(dtype, int(digits[0]) / 8 if digits else 1.0)

    return math.fsum(item(dtype) * math.prod(shape) for dtype, shape in _arrays(type_))


def _group_size(rest: str) -> int:
    """Devices of a group, from either way of writing groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(tiled[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return 0


class _Flops:
    """Operations of an instruction's matrix products, those in what it calls among them."""

    def __init__(self, computations: dict[str, dict[str, _Instruction]]):
        self._computations = computations
        self._known: dict[str, float | None] = {}

    def of(self, own: _Instruction, others: dict[str, _Instruction]) -> float | None:
        """None if it has no product."""
        if own.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", own.rest)
            return self._dot(own, others, contracted[1] if contracted else "")
        if own.opcode == "custom-call" and "__cublas" in own.rest:
            dims = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', own.rest)
            return self._dot(own, others, dims[1].replace('"', "") if dims else "")
        if own.opcode == "custom-call" and "mosaic_gpu" in own.rest:
            integers = re.match(r"\(?[su]\d+\[", own.type)  # a kernel that counts or marks
            return None if integers else 0.0
        if own.opcode == "fusion" and (called := re.search(r"calls=%([\w.\-]+)", own.rest)):
            return self._called(called[1])
        return None

    def _called(self, name: str) -> float | None:
        if name not in self._known:
            body = self._computations.get(name, {})
            inside = [work for own in body.values() if (work := self.of(own, body)) is not None]
            self._known[name] = sum(inside) if inside else None
        return self._known[name]

    @staticmethod
    def _dot(own: _Instruction, others: dict[str, _Instruction], contracted: str) -> float:
        left = others.get(_operands(own.rest)[0])
        shape = _arrays(left.type)[0][1] if left else ()
        depth = math.prod(shape[int(dim)] for dim in contracted.split(",") if dim and shape)
        return 2.0 * math.prod(_arrays(own.type)[0][1]) * depth
