import pytest

from jaxrec.distributed import LaunchConfig, LaunchError
from jaxrec.distributed.launchers import find_place, first_host

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-010]",
    "SLURM_JOB_NODELIST": "gpu[007-010]",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
PMI = {"PMI_SIZE": "8", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "11", "JAX_NUM_PROCESSES": "16"}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM_PORT = 61_440 + 5_000 - 4_096


def place(environment, name="pod", **arguments):
    return find_place(LaunchConfig(**arguments), environment, own_name=lambda: name)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (VARIABLES, ("environment variables", "a:1", 2, 1, None)),
        (SLURM | VARIABLES, ("environment variables", "a:1", 2, 1, None)),
        (SLURM, ("Slurm", f"gpu007:{SLURM_PORT}", 8, 3, (1,))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, ("Slurm", f"gpu007:{SLURM_PORT}", 8, 3, None)),
        (SLURM | PMI, ("Slurm", f"gpu007:{SLURM_PORT}", 8, 3, (1,))),
        (SLURM | PMI | {"PMI_RANK": "5"}, ("PMI", f"gpu007:{SLURM_PORT}", 8, 5, (1,))),
        (SLURM | OPEN_MPI, ("Open MPI", "localhost:61440", 4, 2, (2,))),
        (PMI | {"JAX_COORDINATOR_ADDRESS": "b:2"}, ("PMI", "b:2", 8, 3, (1,))),
    ],
)
def test_each_launcher_tells(environment, expected):
    assert place(environment) == expected


def test_kubernetes_finds_pod_0_by_its_own_name():
    found = place(KUBERNETES, "train-11.workers.default.svc.cluster.local")
    assert found[:4] == ("Kubernetes", "train-0.workers.default.svc.cluster.local:61440", 16, 11)
    with pytest.raises(LaunchError, match=r"Kubernetes gives .* no coordinator.*headless service"):
        place(KUBERNETES, "train-11")
    with pytest.raises(LaunchError, match=r"no num_processes.*Set JAX_NUM_PROCESSES"):
        place({"JOB_COMPLETION_INDEX": "1"}, "train-1.workers")


def test_arguments_stand_alone_or_fill_in():
    whole = place({}, coordinator="h:9", num_processes=3, process_id=2, local_device_ids=(4, 5))
    assert whole == ("arguments", "h:9", 3, 2, (4, 5))
    assert place({}, num_processes=1) == ("arguments", "", 1, 0, None)
    assert place(SLURM, coordinator="[::1]:9").coordinator == "[::1]:9"


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, {}, "nothing says which of several processes"),
        ({}, {"coordinator": "h:1", "num_processes": 2}, "no process_id.*all three"),
        ({"JAX_PROCESS_ID": "0"}, {}, "no coordinator and no num_processes.*Set JAX_COORD"),
        (SLURM, {"num_processes": 2}, "num_processes is given as 2, but Slurm says 8"),
        (SLURM | {"SLURM_PROCID": "x"}, {}, "variable SLURM_PROCID is 'x'"),
        (PMI, {}, "PMI does not tell the host of rank 0"),
        ({}, {"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "expected 0 to 1"),
        ({}, {"coordinator": "h", "num_processes": 2, "process_id": 1}, "expected host:port"),
    ],
)
def test_what_is_wrong_is_said(environment, arguments, message):
    with pytest.raises(LaunchError, match=message):
        place(environment, **arguments)


def test_time_outs_are_positive():
    with pytest.raises(ValueError, match="heartbeat_timeout is 0"):
        LaunchConfig(heartbeat_timeout=0)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("a[1-3],b", "a1"), ("b,a[1-3]", "b"), ("n[03,7]-ib,c", "n03-ib")],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first
