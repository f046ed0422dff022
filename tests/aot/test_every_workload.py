"""Every kernel for each of its workloads; the table at the end of the run comes from here."""

import pytest

from pallas_kernels.aot import aot_available, compile_workload, kernel_workloads, table_rows

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]


@pytest.mark.parametrize(
    ("op", "name", "workload"),
    [pytest.param(*each, id="-".join(each[:2])) for each in kernel_workloads()],
)
def test_compiles_without_spills(op, name, workload, record_property):
    report = compile_workload(workload)
    record_property("kernel_table", table_rows(op, name, report))
    kernels = [kernel for kernel in report.kernels if "mosaic_gpu" in kernel.name]
    assert kernels
    for kernel in kernels:
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel.name
