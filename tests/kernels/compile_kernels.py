"""Runs the report with the stand-ins beside the shipped kernels: `compile_kernels.py FACTS.json TABLES.md`.

A process of its own, since TRITON_INTERPRET must not be set in it.
"""

from __future__ import annotations

import sys

import standin_kernels

from megafish_kernels import report

report.WORKLOADS.update(standin_kernels.WORKLOADS)
report.PRODUCTS = report.PRODUCTS | standin_kernels.PRODUCTS
sys.exit(report.main(["--arch", "80", "90", "--json", sys.argv[1], "--markdown", sys.argv[2]]))
