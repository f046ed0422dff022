"""Which process this is, and of how many: from arguments, variables, or what started it."""

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

FIRST_PORT, NUM_PORTS = 61_440, 4_096  # above the ports that systems give to outgoing connections
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class LaunchError(RuntimeError):
    """The processes could not be brought together; the message says why and what to do."""


@dataclass(frozen=True)
class LaunchConfig:
    """How this process joins the others. None is found out; see `find_place`.

    Attributes:
      coordinator: host:port of process 0, which all others can reach.
      num_processes: of the whole job.
      process_id: of this one, from 0.
      local_device_ids: GPUs that this process takes of its host's; None takes the one that the
        launcher's local number says, or all where there is no such number.
      start_timeout: seconds in which all processes must have come.
      heartbeat_timeout: seconds of silence after which a process counts as lost. Compiling and
        reading do not count as silence; a stopped process does.
      exit_timeout: seconds that processes which are done wait for the others.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    start_timeout: float | int = 300.0
    heartbeat_timeout: float | int = 60.0
    exit_timeout: float | int = 300.0

    def __post_init__(self):
        for name in ("start_timeout", "heartbeat_timeout", "exit_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected seconds above 0")


class Place(NamedTuple):
    """Where a process stands.

    Attributes:
      found: what told: "arguments", "environment variables", "Slurm", "Open MPI", "PMI" or
        "Kubernetes".
      coordinator: host:port; empty for a single process.
      local_device_ids: None takes all devices that are visible.
    """

    found: str
    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None


class _Found(NamedTuple):
    """What one source tells; None where it does not say."""

    found: str
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    local_id: int | None = None
    hint: str = ""


def find_place(
    config: LaunchConfig,
    environment: Mapping[str, str],
    *,
    own_name: Callable[[], str] = socket.getfqdn,
) -> Place:
    """Works out this process's place.

    The first of these that is there tells, and arguments fill in what it leaves open:
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, all three; Open MPI; PMI (MPICH,
    Intel MPI); Slurm (`srun`); Kubernetes (an indexed job, with JAX_NUM_PROCESSES); else arguments
    alone. The first variable takes the place of a found address, an argument that of both.

    Args:
      environment: the process's variables.
      own_name: gives this host's full name, for Kubernetes.

    Raises:
      LaunchError: nothing found; something missing; an argument contradicts what was found.
    """
    if config.num_processes == 1 and config.process_id in (None, 0):
        return Place("arguments", "", 1, 0, config.local_device_ids)
    told = _told(environment, own_name)
    _check_agreement(config, told)
    coordinator = config.coordinator or environment.get(VARIABLES[0]) or told.coordinator
    count = told.num_processes if config.num_processes is None else config.num_processes
    number = told.process_id if config.process_id is None else config.process_id
    parts = {"coordinator": coordinator, "num_processes": count, "process_id": number}
    missing = [name for name, value in parts.items() if value is None]
    if count == 1 and number == 0:
        missing = []
    if missing:
        raise LaunchError(_missing_message(parts, missing, told))
    assert count is not None
    assert number is not None
    if not 0 <= number < count:
        raise LaunchError(f"process_id is {number}; expected 0 to {count - 1} of {count} processes")
    if coordinator:
        split_address(coordinator)
    return Place(told.found, coordinator or "", count, number, _devices(config, told, environment))


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[address]:port".

    Raises:
      LaunchError: it is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise LaunchError(f"the coordinator is {address!r}; expected host:port, as node1:61500")
    return host.strip("[]"), int(port)


def _told(environment: Mapping[str, str], own_name: Callable[[], str]) -> _Found:
    """What the first source that is there tells."""
    if all(name in environment for name in VARIABLES):
        return _from_variables(environment)
    # In a Slurm job mpirun's processes see the numbers of Slurm's own step, which are not theirs.
    for find in (_from_open_mpi, _from_pmi, _from_slurm):
        if (found := find(environment)) is not None:
            return found
    if "JOB_COMPLETION_INDEX" in environment:
        return _from_kubernetes(environment, own_name)
    if any(name in environment for name in VARIABLES):
        return _from_variables(environment)
    return _Found("arguments", None, None, None)


def _check_agreement(config: LaunchConfig, told: _Found) -> None:
    for name in ("num_processes", "process_id"):
        argument, found = getattr(config, name), getattr(told, name)
        if argument is not None and found is not None and argument != found:
            raise LaunchError(
                f"{name} is given as {argument}, but {told.found} says {found}. Leave the argument "
                "out, or start as many processes as it says."
            )


def _missing_message(parts: Mapping[str, object], missing: list[str], told: _Found) -> str:
    given = [f"{name} {value}" for name, value in parts.items() if value is not None]
    if not given:
        return (
            "nothing says which of several processes this is. Start it with srun, mpirun or as an "
            f"indexed Kubernetes job, set {', '.join(VARIABLES)}, or give coordinator, "
            "num_processes and process_id"
        )
    return (
        f"{told.found} gives {', '.join(given)} but no {' and no '.join(missing)}. "
        f"{told.hint or 'Give coordinator, num_processes and process_id, all three'}"
    )


def _devices(
    config: LaunchConfig, told: _Found, environment: Mapping[str, str]
) -> tuple[int, ...] | None:
    if config.local_device_ids is not None or told.local_id is None:
        return config.local_device_ids
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if visible and "," not in visible:  # the launcher has given each process its own
        return None
    return (told.local_id,)


def _from_variables(environment: Mapping[str, str]) -> _Found:
    address, count, number = VARIABLES
    return _Found(
        "environment variables",
        environment.get(address),
        _number(environment, count) if count in environment else None,
        _number(environment, number) if number in environment else None,
        hint=f"Set {', '.join(VARIABLES)}, all three",
    )


def _from_slurm(environment: Mapping[str, str]) -> _Found | None:
    if not {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        return None  # the last is there only inside srun
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    port = _port(_number(environment, "SLURM_JOB_ID"))
    return _Found(
        "Slurm",
        f"{first_host(environment['SLURM_STEP_NODELIST'])}:{port}",
        _number(environment, tasks),
        _number(environment, "SLURM_PROCID"),
        _number(environment, "SLURM_LOCALID") if "SLURM_LOCALID" in environment else None,
    )


def _from_open_mpi(environment: Mapping[str, str]) -> _Found | None:
    names = (f"OMPI_COMM_WORLD_{part}" for part in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))
    return _from_mpi("Open MPI", environment, *names)


def _from_pmi(environment: Mapping[str, str]) -> _Found | None:
    names = ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    found, slurm = _from_mpi("PMI", environment, *names), _from_slurm(environment)
    same = found and slurm and found[2:4] == slurm[2:4]
    return None if same else found  # srun sets both, and Slurm tells more


def _from_mpi(
    found: str, environment: Mapping[str, str], size: str, rank: str, local: str, local_size: str
) -> _Found | None:
    """MPI's launchers do not say where rank 0 runs; on a single host that is here."""
    if not {size, rank} <= environment.keys():
        return None
    address = None
    if environment.get(local_size) == environment[size]:
        started_by = environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_orte_hnp_uri", ""))
        address = f"localhost:{_port(sum(map(ord, started_by)))}"
    elif "SLURM_JOB_NODELIST" in environment:
        port = _port(_number(environment, "SLURM_JOB_ID"))
        address = f"{first_host(environment['SLURM_JOB_NODELIST'])}:{port}"
    return _Found(
        found,
        address,
        _number(environment, size),
        _number(environment, rank),
        _number(environment, local) if local in environment else None,
        hint=f"{found} does not tell the host of rank 0: give coordinator, or {VARIABLES[0]}",
    )


def _from_kubernetes(environment: Mapping[str, str], own_name: Callable[[], str]) -> _Found:
    """The pods of an indexed job are called <job>-<index>.<subdomain>."""
    count, index = VARIABLES[1], environment["JOB_COMPLETION_INDEX"]
    pod, _, domain = own_name().partition(".")
    address = None
    if domain and pod.endswith(f"-{index}"):
        address = f"{pod.removesuffix(index)}0.{domain}:{FIRST_PORT}"
    return _Found(
        "Kubernetes",
        address,
        _number(environment, count) if count in environment else None,
        _number(environment, "JOB_COMPLETION_INDEX"),
        hint=f"Set {count} to the job's completions, and give the pods a subdomain with a "
        f"headless service (or set {VARIABLES[0]})",
    )


def first_host(nodes: str) -> str:
    """The first of a Slurm node list: "gpu[007-010,12]-ib,cpu1" → "gpu007-ib"."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.partition(",")[0]
    inside, _, tail = rest.partition("]")
    return head + inside.partition(",")[0].partition("-")[0] + tail.partition(",")[0]


def _port(job: int) -> int:
    """One port for one job, so that two on a host seldom meet."""
    return FIRST_PORT + job % NUM_PORTS


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise LaunchError(f"the variable {name} is {text!r}; expected a number from 0")
    return int(text)
