"""What a machine would do, from what is known of it."""

import dataclasses

import pytest

from jaxrec.distributed import XlaOptions, doctor
from jaxrec.distributed.doctor import Facts, diagnose

GOOD = Facts(("NVIDIA H200",) * 8, (13, 0), (2, 32, 3), True)
FREE = XlaOptions(symmetric_buffers=True)


def by_kind(facts, options=FREE, num_devices=8):
    return {found.collective: found for found in diagnose(facts, options, num_devices)}


def test_exchanges_run_on_copy_engines_and_reductions_do_not():
    found = by_kind(GOOD)
    assert found["all-to-all"].runs_on == found["all-gather"].runs_on == doctor.COPY_ENGINES
    assert found["all-reduce"].runs_on == doctor.MULTIPROCESSORS
    assert "set max_channels" in found["all-reduce"].why
    bounded = by_kind(GOOD, dataclasses.replace(FREE, max_channels=4))
    assert "at most 4" in bounded["all-reduce"].why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gpus": ()}, "no NVIDIA driver"),
        ({"nccl": (2, 27, 7)}, "NCCL is 2.27.7; it takes 2.28"),
        ({"nccl": None}, "NCCL is missing"),
        ({"cuda": (12, 4)}, "knows CUDA 12.4"),
        ({"nvlink": False}, "not all GPUs"),
        ({"environment": {"NCCL_CTA_POLICY": "DEFAULT"}}, "NCCL_CTA_POLICY is DEFAULT"),
    ],
)
def test_what_is_missing_is_named(change, why):
    found = by_kind(dataclasses.replace(GOOD, **change))["all-to-all"]
    assert found.runs_on == doctor.MULTIPROCESSORS
    assert why in found.why


def test_options_and_hosts_matter():
    assert "symmetric_buffers=True" in by_kind(GOOD, XlaOptions())["all-to-all"].why
    assert by_kind(GOOD, num_devices=256)["all-to-all"].runs_on == doctor.COPY_ENGINES
    older = dataclasses.replace(GOOD, nccl=(2, 29, 1))
    assert "several hosts need 2.30.7" in by_kind(older, num_devices=256)["all-to-all"].why
    assert by_kind(GOOD, num_devices=1)["all-reduce"].runs_on == doctor.NOTHING


def test_topology_of_this_form():
    head = "        GPU0    GPU1    CPU Affinity\n"
    assert doctor._all_joined(
        head + "GPU0     X      NV18    0-31\nGPU1    NV18     X      0-31\n", 2
    )
    assert not doctor._all_joined(head + "GPU0     X   SYS  0-31\nGPU1    SYS   X   0-31\n", 2)
    assert doctor._all_joined("", 2) is None


def test_it_looks_and_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["doctor", "--devices", "16", "--max-channels", "2"])
    doctor.main()
    printed = capsys.readouterr().out
    assert "all-to-all" in printed
    assert "xla_gpu_experimental_enable_nccl_symmetric_buffers=true" in printed
