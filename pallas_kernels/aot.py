"""Compiling for an H200 on a machine without a GPU, and reading what the compiler made.

Needs the CUDA plugin of JAX and NVIDIA's compiler tools, which the `aot` dependency group installs;
no driver and no GPU. The default backend stays what it is, usually the CPU. On the command line

    python -m pallas_kernels.aot

compiles every kernel for each of its workloads and prints one row for each.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What the compiler wants to know of one H200 SXM; numbers from NVIDIA's published specification.
_H200_CHIP = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 48 * 1024,
    "shared_memory_per_core": 228 * 1024,
    "shared_memory_per_block_optin": 227 * 1024,
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "memory_bandwidth": 4_800_000_000_000,
    "l2_cache_size": 50 * 2**20,
    "device_memory_size": 141 * 10**9,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
_CAPABILITY, _CUDNN = 9.0, 91000  # the latter as cuDNN writes its version 9.10.0
_H200 = """
gpu_device_info {{
  {chip}
  cuda_compute_capability {{ major: 9 minor: 0 }}
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA H200"
""".format(chip="\n  ".join(f"{name}: {value}" for name, value in _H200_CHIP.items()))

TABLE_HEAD = """\
| op | workload | kernel | registers | spilled B | shared B | instructions | temp B |
|---|---|---|---|---|---|---|---|"""


class _Instruction(NamedTuple):
    """One of machine code; `target` is where a jump goes."""

    address: int
    opcode: str
    target: int | None


@dataclass(frozen=True)
class _Module:
    """What one PTX file holds, assembled when somebody asks."""

    ptx: str = field(repr=False)
    launch_smem: int

    @functools.cached_property
    def assembled(self) -> tuple[str, bytes]:
        """(what the assembler says, machine code)."""
        target = re.search(r"^\.target (\w+)", self.ptx, re.MULTILINE)
        arch = target[1] if target else "sm_90a"
        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = Path(folder) / "kernels.ptx", Path(folder) / "kernels.cubin"
            ptx.write_text(self.ptx)
            log = _run(_tool("ptxas") or "", "-v", f"-arch={arch}", "-o", cubin, ptx)
            return log, cubin.read_bytes()

    @functools.cached_property
    def instructions(self) -> dict[str, list[_Instruction]]:
        """Those of each kernel."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.assembled[1])
            return _parse_sass(_run(_tool("cuobjdump") or "", "-sass", file.name))


@dataclass(frozen=True)
class KernelReport:
    """One kernel of a compiled program.

    It is assembled, and disassembled, when somebody asks for what that tells: most programs hold
    many kernels of XLA's that nobody asks about.

    Attributes:
      name: entry function.
      module: the PTX that it is part of.
    """

    name: str
    module: _Module

    @property
    def ptx(self) -> str:
        """Source of the module that the kernel belongs to."""
        return self.module.ptx

    @functools.cached_property
    def _assembler_log(self) -> str:
        own = rf"Compiling entry function '{re.escape(self.name)}'(.*?)(?=Compiling entry|\Z)"
        found = re.search(own, self.module.assembled[0], re.DOTALL)
        if found is None:
            raise RuntimeError(f"ptxas says nothing of {self.name}: {self.module.assembled[0]}")
        return found[1]

    @property
    def registers(self) -> int:
        """For each thread."""
        return _number(r"Used (\d+) registers", self._assembler_log)

    @property
    def spill_store_bytes(self) -> int:
        """Registers written to local memory, for each thread."""
        return _number(r"(\d+) bytes spill stores", self._assembler_log)

    @property
    def spill_load_bytes(self) -> int:
        """Registers read back, for each thread."""
        return _number(r"(\d+) bytes spill loads", self._assembler_log)

    @property
    def stack_bytes(self) -> int:
        """Local memory of each thread."""
        return _number(r"(\d+) bytes stack", self._assembler_log)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of each block."""
        return self.module.launch_smem or _number(r"(\d+) bytes smem", self._assembler_log)

    @property
    def instructions(self) -> Counter[str]:
        """Machine instructions by their full name, such as LDG.E.128."""
        return Counter(one.opcode for one in self.module.instructions[self.name])

    @property
    def loops(self) -> list[Counter[str]]:
        """Instructions of each loop, inner loops before those around them.

        A loop is what stands between a jump back and its target. What the compiler moved behind the
        last exit is not counted: what to do where a wait fails at first.
        """
        code = self.module.instructions[self.name]
        last = max((one.address for one in code if one.opcode == "EXIT"), default=0)
        spans = sorted(
            (one.address - one.target, one.target, one.address)
            for one in code
            if one.target is not None and one.target <= one.address < last
        )
        return [
            Counter(one.opcode for one in code if first <= one.address <= end)
            for _, first, end in spans
        ]

    def count(self, opcode: str) -> int:
        """Instructions named `opcode`, with or without further modifiers."""
        names = (name for name in self.instructions if f"{name}.".startswith(f"{opcode}."))
        return sum(self.instructions[name] for name in names)


@dataclass(frozen=True)
class Report:
    """A program compiled for H200.

    Attributes:
      compiled: JAX's compiled object; it cannot be called here.
      kernels: every kernel, the hand-written and XLA's own.
      temp_bytes: scratch device memory of the whole program, on each device.
      hlo_text: the scheduled HLO.
    """

    compiled: Any
    kernels: list[KernelReport]
    temp_bytes: int
    hlo_text: str

    def kernel(self, name: str) -> KernelReport:
        """The one kernel whose entry name contains `name`."""
        found = [kernel for kernel in self.kernels if name in kernel.name]
        if len(found) != 1:
            names = ", ".join(kernel.name for kernel in self.kernels)
            raise ValueError(f"expected one kernel with {name!r} in its name; there are: {names}")
        return found[0]


@functools.cache
def aot_available() -> str | None:
    """None where `compile_for_h200` works, else what is missing."""
    plugins = importlib.util.find_spec("jax_plugins")  # a child of a missing package would raise
    if plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "JAX's CUDA plugin is not installed; run: uv sync --group aot"
    if missing := [tool for tool in ("ptxas", "cuobjdump") if _tool(tool) is None]:
        return f"no {' or '.join(missing)} found; run: uv sync --group aot"
    try:
        _topology(1)
    except Exception as error:  # the plugin raises several types
        return f"the CUDA plugin did not start ({error}); set JAX_PLATFORMS=cpu and retry"
    return None


def h200_mesh(axes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of H200 GPUs that exist for the compiler only; without `axes`, of one."""
    axes = dict(axes or {"device": 1})
    sizes = tuple(axes.values())
    devices = np.array(_topology(int(np.prod(sizes))).devices).reshape(sizes)
    return Mesh(devices, tuple(axes))


def cudnn_of_an_h200() -> contextlib.AbstractContextManager[Any]:
    """JAX asks the machine that traces for its cuDNN and its GPU; meanwhile it hears an H200's."""
    return mock.patch.multiple(
        "jax._src.cudnn.fused_attention_stablehlo",
        check_cudnn_version=lambda: _CUDNN,
        check_compute_capability=lambda wanted: float(wanted) <= _CAPABILITY,
    )


def compile_for_h200(
    fn: Callable[..., Any],
    *args: Any,
    num_devices: int = 1,
    mesh: Mesh | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    compiler_options: Mapping[str, Any] | None = None,
    kernels: bool = True,
) -> Report:
    """Compiles `fn` for H200s, with `backend=None` meaning what it would there.

    Args:
      fn: a function of arrays; jitted here.
      args: `jax.ShapeDtypeStruct`s or arrays, of which only shape and dtype count.
      num_devices: size of the mesh with one axis, "device", if `mesh` is not given.
      mesh: from `h200_mesh`, for programs with named axes.
      in_shardings, out_shardings: as `jax.jit` takes them; partition specs are placed on the mesh.
        None replicates.
      compiler_options: further XLA options, such as {"xla_gpu_...": True}.
      kernels: reports kernels; without, a third less work.

    Raises:
      RuntimeError: the tools are missing (`aot_available` says which).
      Exception: whatever the compiler says to a program that it rejects.

    Cost: one to six seconds for each hand-written kernel.
    """
    if reason := aot_available():
        raise RuntimeError(f"cannot compile for H200 here: {reason}")
    mesh = h200_mesh({"device": num_devices}) if mesh is None else mesh
    place = functools.partial(_on_mesh, mesh)
    # A new function each time: a trace of `fn` made for another device must not be reused.
    jitted = jax.jit(
        lambda *args: fn(*args),
        in_shardings=place(in_shardings),
        out_shardings=place(out_shardings),
    )
    with tempfile.TemporaryDirectory(prefix="h200_") as folder:
        # Passed to this compile alone: dump flags in XLA_FLAGS abort concurrent CPU compiles.
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": ".*"} if kernels else {}
        with _environment(_wishes(Path(folder) if kernels else None)):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), cudnn_of_an_h200():
                lowered = jitted.lower(*args)
            compiled = lowered.compile(compiler_options=options | dict(compiler_options or {}))
        reports = [kernel for ptx in sorted(Path(folder).rglob("*.ptx")) for kernel in _read(ptx)]
    memory, hlo_text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or hlo_text is None:
        raise RuntimeError(
            "the CUDA plugin gave no memory analysis or no HLO; is it of JAX's version?"
        )
    return Report(compiled, reports, memory.temp_size_in_bytes, hlo_text)


def _on_mesh(mesh: Mesh, shardings: Any) -> Any:
    if shardings is None:
        return NamedSharding(mesh, PartitionSpec())
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, leaf) if is_spec(leaf) else leaf,
        shardings,
        is_leaf=is_spec,
    )


@functools.cache
def _topology(num_devices: int) -> Any:
    hosts = max(1, num_devices // 8)  # of eight each, which NVLink joins
    topology = f"1x{hosts}x{num_devices // hosts}"
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=topology, target_config=_H200
    )


def _wishes(dump: Path | None) -> dict[str, str]:
    """What compilers take from the environment: Mosaic GPU writes its PTX to `dump`, if given."""
    importlib.import_module("jax.experimental.mosaic.gpu")  # sets the CUDA root when imported
    # XLA's warnings carry stacks, whose names take longer to look up than a program to compile.
    wishes = {"LLVM_DISABLE_SYMBOLIZATION": "1"}
    if dump is None:
        return wishes
    wishes |= {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTX": "1"}
    if disassembler := _tool("nvdisasm"):  # a dump disassembles too, and complains without one
        wishes["MOSAIC_GPU_CUDA_ROOT"] = str(Path(disassembler).parents[1])
    return wishes


@contextlib.contextmanager
def _environment(wishes: Mapping[str, str]) -> Iterator[None]:
    """The process's environment with these variables meanwhile."""
    before = {name: os.environ.get(name) for name in wishes}
    os.environ.update(wishes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@functools.cache
def _tool(name: str) -> str | None:
    """A compiler tool: from the wheels that carry it, from PATH, or from the usual place."""
    wheels = ("nvidia/cu13/bin", "triton/backends/nvidia/bin")
    folders = [Path(entry) / wheel for entry in sys.path for wheel in wheels]
    candidates = [folder / name for folder in folders]
    candidates += [Path(shutil.which(name) or ""), Path("/usr/local/cuda/bin") / name]
    return next((str(path) for path in candidates if path.is_file()), None)


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _read(ptx: Path) -> list[KernelReport]:
    """The kernels of one PTX file."""
    module = _Module(ptx.read_text(), _launch_smem(ptx))
    names = re.findall(r"^\.visible \.entry (\w+)", module.ptx, re.MULTILINE)
    return [KernelReport(name, module) for name in names]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _parse_sass(listing: str) -> dict[str, list[_Instruction]]:
    """Instructions of each function of a disassembly."""
    line = re.compile(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*)", re.MULTILINE
    )
    found = {}
    for function in re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]:
        code = []
        for address, opcode, operands in line.findall(function):
            jump = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
            target = int(jump[1], 16) if jump else None
            code.append(_Instruction(int(address, 16), opcode, target))
        found[function.split(maxsplit=1)[0]] = code
    return found


def _launch_smem(ptx: Path) -> int:
    """Shared memory that a Mosaic kernel asks for at launch; its PTX alone does not tell."""
    passes = ptx.with_suffix(".mlir-passes.log")
    text = passes.read_text() if passes.exists() else ""
    return _number(r"dynamic_shared_memory_size %c(\d+)_i32", text)


def kernel_workloads() -> Iterator[tuple[str, str, Any]]:
    """(op, name of the workload, workload) of every op that has a kernel."""
    package = importlib.import_module("pallas_kernels")
    for module in pkgutil.iter_modules(package.__path__):
        kernel = f"pallas_kernels.{module.name}.mosaic_gpu"
        if module.ispkg and importlib.util.find_spec(kernel):
            workloads = importlib.import_module(f"pallas_kernels.{module.name}.workloads")
            for name, workload in workloads.WORKLOADS.items():
                yield module.name, name, workload


def compile_workload(workload: Any) -> Report:
    """One of `kernel_workloads`, by its kernels."""
    run = functools.partial(workload.run, backend="mosaic_gpu")
    return compile_for_h200(run, *workload.shapes())


def table_rows(op: str, name: str, report: Report) -> list[str]:
    """A row below `TABLE_HEAD` for each hand-written kernel of a compiled workload."""
    return [
        f"| {op} | {name} | `{kernel.name}` | {kernel.registers} "
        f"| {kernel.spill_store_bytes + kernel.spill_load_bytes} | {kernel.smem_bytes} "
        f"| {kernel.instructions.total()} | {report.temp_bytes} |"
        for kernel in report.kernels
        if "mosaic_gpu" in kernel.name
    ]


def main() -> None:
    """Prints registers, spills, shared memory and instructions of every hand-written kernel."""
    jax.config.update("jax_platforms", "cpu")  # before the plugin looks for a driver
    if reason := aot_available():
        sys.exit(f"cannot compile for H200 here: {reason}")
    print(TABLE_HEAD)
    for op, name, workload in kernel_workloads():
        print(*table_rows(op, name, compile_workload(workload)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
