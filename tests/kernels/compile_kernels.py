"""Runs the report with the stand-ins beside the shipped kernels: `compile_kernels.py FACTS.json TABLES.md B200.json`.

A process of its own, since TRITON_INTERPRET must not be set in it. For sm_100 only the loss with all features is
compiled, which comes nearest to a limit, to keep the tests short.
"""

from __future__ import annotations

import sys

import standin_kernels

from megafish_kernels import report

facts, tables, blackwell = sys.argv[1:]
if status := report.main(["--arch", "100", "--kernels", "linear_cross_entropy_all", "--json", blackwell]):
    sys.exit(status)
report.WORKLOADS.update(standin_kernels.WORKLOADS)
report.PRODUCTS = report.PRODUCTS | standin_kernels.PRODUCTS
sys.exit(report.main(["--arch", "80", "90", "--json", facts, "--markdown", tables]))
