"""Device-less compiles need the CUDA plugin registered where no driver answers its checks."""

import os

from pallas_kernels.aot import TABLE_HEAD

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def pytest_terminal_summary(terminalreporter):
    """What the tests recorded as "kernel_table", in one table."""
    reports = (r for outcome in ("passed", "failed") for r in terminalreporter.getreports(outcome))
    recorded = (value for r in reports for key, value in r.user_properties if key == "kernel_table")
    if rows := sorted(row for rows in recorded for row in rows):
        terminalreporter.section("kernels compiled for an H200")
        terminalreporter.write_line("\n".join([TABLE_HEAD, *rows]))
