"""Which collectives this machine runs on copy engines, which take multiprocessors, and why.

    python -m jaxrec.distributed.doctor
    python -m jaxrec.distributed.doctor --devices 256

NCCL moves an all-gather or an all-to-all by copy engines, without a multiprocessor, if

- XLA puts its buffers in symmetric memory (`XlaOptions(symmetric_buffers=True)`) and asks for no
  thread blocks, which it does for asynchronous collectives;
- NCCL is 2.28 or newer, the driver knows CUDA 12.5 or newer;
- all ranks are joined by NVLink (NCCL 2.30.7 and newer: or each host's are).

Reductions compute, so they always take some; `XlaOptions(max_channels=…)` bounds how many. Source:
NCCL's and XLA's sources, as of NCCL 2.32 and jaxlib 0.11.2.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxrec.distributed.xla_options import XlaOptions

COPY_ENGINES, MULTIPROCESSORS, NOTHING = "copy engines", "multiprocessors", "nothing"
EXCHANGES = ("all-gather", "all-to-all")
REDUCTIONS = ("all-reduce", "reduce-scatter")
FIRST_NCCL = (2, 28)  # that can do without thread blocks
FIRST_NCCL_OVER_HOSTS = (2, 30, 7)
FIRST_CUDA = (12, 5)
HOST_DEVICES = 8


@dataclass(frozen=True)
class Facts:
    """What is known of a machine.

    Attributes:
      gpus: their names; empty without a driver.
      cuda: the newest CUDA that the driver knows, None without one.
      nccl: its version, None if none is installed.
      nvlink: whether all GPUs here are joined by NVLink; None if nobody tells.
      environment: variables that NCCL and XLA read.
    """

    gpus: tuple[str, ...] = ()
    cuda: tuple[int, ...] | None = None
    nccl: tuple[int, ...] | None = None
    nvlink: bool | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """How one kind of collective runs: on copy engines, multiprocessors or not at all, and why."""

    collective: str
    runs_on: str
    why: str


def look() -> Facts:
    """Asks this machine; nothing is started on a GPU."""
    smi = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    head = re.search(r"CUDA Version:\s*([\d.]+)", _run("nvidia-smi"))
    gpus = tuple(line.strip() for line in smi.splitlines() if line.strip())
    wanted = ("NCCL_", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES")
    return Facts(
        gpus=gpus,
        cuda=_version(head[1]) if head else None,
        nccl=_nccl(),
        nvlink=_all_joined(_run("nvidia-smi", "topo", "-m"), len(gpus)) if gpus else None,
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(wanted)},
    )


def diagnose(facts: Facts, options: XlaOptions, num_devices: int) -> list[Finding]:
    """What each kind of collective would run on.

    Args:
      facts: of one of the hosts, which are taken to be alike.
      options: that the program is compiled with.
      num_devices: that take part, over all hosts.
    """
    if num_devices < 2:
        alone = "one device exchanges nothing"
        return [Finding(kind, NOTHING, alone) for kind in (*EXCHANGES, *REDUCTIONS)]
    missing = _missing(facts, options, num_devices)
    runs_on = MULTIPROCESSORS if missing else COPY_ENGINES
    why = "; ".join(missing) or "symmetric buffers, NVLink, NCCL without thread blocks"
    found = [Finding(kind, runs_on, why) for kind in EXCHANGES]
    bound = options.max_channels or facts.environment.get("NCCL_MAX_CTAS")
    at_most = f"at most {bound} of them" if bound else "as many as NCCL likes: set max_channels"
    return found + [Finding(kind, MULTIPROCESSORS, f"it adds; {at_most}") for kind in REDUCTIONS]


def _missing(facts: Facts, options: XlaOptions, num_devices: int) -> list[str]:
    """What keeps all-gathers and all-to-alls from copy engines."""
    hosts = -(-num_devices // max(1, len(facts.gpus) or HOST_DEVICES))
    first = FIRST_NCCL_OVER_HOSTS if hosts > 1 else FIRST_NCCL
    checks = [
        (bool(facts.gpus), "no NVIDIA driver answers here"),
        (
            options.symmetric_buffers,
            "buffers are not in symmetric memory: set XlaOptions(symmetric_buffers=True)",
        ),
        (
            facts.nccl is not None and facts.nccl >= first,
            f"NCCL is {_text(facts.nccl)}; {'several hosts need' if hosts > 1 else 'it takes'} "
            f"{_text(first)}",
        ),
        (
            facts.cuda is not None and facts.cuda >= FIRST_CUDA,
            f"the driver knows CUDA {_text(facts.cuda)}; it takes {_text(FIRST_CUDA)}",
        ),
        (facts.nvlink is not False, "not all GPUs of a host are joined by NVLink"),
        (
            facts.environment.get("NCCL_CTA_POLICY", "ZERO").upper() in ("ZERO", "2"),
            f"NCCL_CTA_POLICY is {facts.environment.get('NCCL_CTA_POLICY')}, which asks for "
            "thread blocks",
        ),
    ]
    return [problem for fine, problem in checks if not fine]


def _run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout if done.returncode == 0 else ""


def _nccl() -> tuple[int, ...] | None:
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.lower().replace("_", "-").startswith("nvidia-nccl"):
            return _version(distribution.version)
    return None


def _all_joined(topology: str, num_gpus: int) -> bool | None:
    """Whether every GPU's row of `nvidia-smi topo -m` has NVLink to every other."""
    rows = re.findall(r"^GPU\d+\s+(.*)$", topology, re.MULTILINE)
    if len(rows) != num_gpus:
        return None
    links = [row.split()[:num_gpus] for row in rows]
    return all(link == "X" or link.startswith("NV") for row in links for link in row)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _text(version: tuple[int, ...] | None) -> str:
    return "missing" if version is None else ".".join(map(str, version))


def main() -> None:
    """Prints what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--devices", type=int, help="over all hosts; default: this host's")
    parser.add_argument("--max-channels", type=int, default=0)
    parser.add_argument("--private", action="store_true", help="without symmetric buffers")
    asked = parser.parse_args()
    options = XlaOptions(symmetric_buffers=not asked.private, max_channels=asked.max_channels)
    facts = look()
    print(f"GPUs     {len(facts.gpus)}" + (f" × {facts.gpus[0]}" if facts.gpus else ""))
    print(f"driver   CUDA {_text(facts.cuda)}")
    print(f"NCCL     {_text(facts.nccl)}")
    print(f"NVLink   {facts.nvlink}")
    print(f"options  {options.xla_flags()}")
    for name, value in facts.environment.items():
        print(f"{name}={value}")
    for finding in diagnose(facts, options, asked.devices or len(facts.gpus) or HOST_DEVICES):
        print(f"{finding.collective:15}{finding.runs_on:18}{finding.why}")


if __name__ == "__main__":
    main()
