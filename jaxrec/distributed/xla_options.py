"""Options of the compiler that let exchanges run beneath computation, and beside its processors.

    options = XlaOptions(gradient_bucket_bytes=8 << 20)
    step = jax.jit(step, compiler_options=options.compiler_options())

XLA ends the process at an unknown name in XLA_FLAGS, and its names change from month to month: here
every name and value is tried on the installed compiler, and refused with the nearest that it has.
"""

import difflib
import functools
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import jaxlib.version

type Value = bool | int | str

_MODES = {
    "private": "COLLECTIVES_PRIVATE_MEMORY",
    "peer": "COLLECTIVES_PEER_MEMORY",
    "symmetric": "COLLECTIVES_SYMMETRIC_MEMORY",
}


class UnknownOptionError(ValueError):
    """The compiler has no option of that name, or takes no such value for it."""


@dataclass(frozen=True)
class XlaOptions:
    """What a training step over many GPUs is compiled with; on other backends nothing changes.

    Attributes:
      latency_hiding: the scheduler moves work between the start and the done of a collective.
      start_early: collectives start as soon as what they send is there. Without it the scheduler
        starts them as late as it believes to suffice, and it takes the link between hosts for as
        fast as NVLink.
      parallel_collectives: how many may be under way together; too few, and those that wait long
        keep an early exchange from starting.
      gradient_bucket_bytes: gradients are summed over devices in buckets of this size, each as soon
        as the backward pass has filled it; None takes the compiler's, 30 MB.
      collectives: where the buffers of all-gathers, permutes and ragged all-to-alls are: "private",
        "peer" (read by the others over NVLink), or "symmetric" (registered with NCCL).
      symmetric_buffers: all NCCL buffers are in symmetric memory: with NCCL 2.28 and NVLink between
        all ranks all-gathers and all-to-alls then run on copy engines and take no multiprocessor.
      max_channels: multiprocessors that a collective of NCCL may take, for those that have to
        compute, such as reductions; 0 leaves it to NCCL.
      more: further options by their XLA names.

    Raises:
      UnknownOptionError: the installed compiler does not know a name, or does not take a value.
    """

    latency_hiding: bool = True
    start_early: bool = True
    parallel_collectives: int = 8
    gradient_bucket_bytes: int | None = 16 << 20
    collectives: Literal["private", "peer", "symmetric"] = "private"
    symmetric_buffers: bool = False
    max_channels: int = 0
    more: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self):
        if self.parallel_collectives < 1 or self.max_channels < 0:
            raise ValueError(
                f"parallel_collectives is {self.parallel_collectives} and max_channels "
                f"{self.max_channels}; expected at least 1 and at least 0"
            )
        if self.collectives not in _MODES:
            raise ValueError(f"collectives is {self.collectives!r}; expected one of {list(_MODES)}")
        check_options(self.compiler_options())

    def compiler_options(self) -> dict[str, Value]:
        """For `jax.jit(…, compiler_options=…)` and `compile`."""
        options: dict[str, Value] = {
            "xla_gpu_enable_latency_hiding_scheduler": self.latency_hiding,
            "xla_gpu_experimental_parallel_collective_overlap_limit": self.parallel_collectives,
            "xla_gpu_experimental_collective_start_as_early_as_possible": self.start_early,
        }
        if self.gradient_bucket_bytes is not None:
            options["xla_gpu_all_reduce_combine_threshold_bytes"] = self.gradient_bucket_bytes
        if self.collectives != "private":
            for kind in ("all_gather", "collective_permute", "ragged_all_to_all"):
                options[f"xla_gpu_{kind}_mode"] = _MODES[self.collectives]
        if self.symmetric_buffers:
            options["xla_gpu_experimental_enable_nccl_symmetric_buffers"] = True
        if self.max_channels:
            options["xla_gpu_nccl_collective_max_nchannels"] = self.max_channels
        return options | dict(self.more)

    def xla_flags(self) -> str:
        """For the environment variable XLA_FLAGS, which holds for the whole process."""

        short = {full: name for name, full in _MODES.items()}

        def text(value: Value) -> str:
            return (
                str(value).lower() if isinstance(value, bool) else short.get(str(value), str(value))
            )

        options = self.compiler_options()
        return " ".join(f"--{name}={text(value)}" for name, value in options.items())


def check_options(options: Mapping[str, Value]) -> None:
    """Tries options on the installed compiler.

    Raises:
      UnknownOptionError: with the nearest names that it has.

    Cost: some milliseconds for each; the names are searched only if one is wrong.
    """
    for name, value in options.items():
        problem = _problem(name, value)
        if problem is None:
            continue
        if "No such compile option" not in problem:
            raise UnknownOptionError(f"XLA option {name} does not take {value!r}: {problem}")
        known = [near for near in _near(name) if _is_known(near)]
        nearest = f"; the nearest it has: {', '.join(known[:3])}" if known else ""
        raise UnknownOptionError(
            f"the compiler of jaxlib {jaxlib.version.__version__} has no option {name!r}{nearest}"
        )


@functools.cache
def _problem(name: str, value: Value) -> str | None:
    try:
        _nothing().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return None


def _is_known(name: str) -> bool:
    return "No such compile option" not in (_problem(name, "?") or "")


@functools.cache
def _nothing() -> jax.stages.Lowered:
    return jax.jit(lambda: 0).lower()


def _near(name: str) -> list[str]:
    return difflib.get_close_matches(name, _names(), n=12, cutoff=0.5)


@functools.cache
def _names() -> tuple[str, ...]:
    """Everything in jaxlib's libraries that looks like the name of an option."""
    found: set[str] = set()
    for library in Path(jaxlib.__file__).parent.glob("libjax_common*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            found |= {name.decode() for name in re.findall(rb"xla_[a-z0-9_]{4,}", view)}
    return tuple(sorted(found))
