"""What the compiler makes of every kernel, and the gates: no spills, shared memory that fits, tensor cores in products.

One process compiles all of them, for sm_80, sm_90 and sm_100, without a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megafish_kernels import aot, report

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Compiled(NamedTuple):
    """One run of the report."""

    facts: dict[str, Any]
    output: str
    progress: str
    markdown: str

    def kernels(self, workload: str, arch: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.facts["kernels"]
        return [row for row in rows if row["workload"] == workload and row["arch"] == arch]

    def broken(self, workload: str, arch: int) -> list[str]:
        return [line for row in self.kernels(workload, arch) for line in row["violations"]]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("aot")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    files = [folder / name for name in ("facts.json", "tables.md", "blackwell.json")]
    command = [sys.executable, str(HERE / "compile_kernels.py"), *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    facts, tables, blackwell = (path.read_text(encoding="utf-8") for path in files)
    both = json.loads(facts)
    both["kernels"] += json.loads(blackwell)["kernels"]
    return Compiled(both, done.stdout, done.stderr, tables)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("workload", report.WORKLOADS)
def test_shipped_kernels_keep_the_rules(compiled: Compiled, workload: str, arch: int) -> None:
    assert compiled.kernels(workload, arch) != []
    assert compiled.broken(workload, arch) == []


def test_large_kernels_fit_on_a_blackwell_gpu(compiled: Compiled) -> None:
    """Their tiles are Hopper's: a spill is shown by the report and not refused, what cannot be started is."""
    rows = [row for row in compiled.facts["kernels"] if row["arch"] == 100]
    assert {row["kernel"] for row in rows} >= report.PRODUCTS
    for row in rows:
        assert row["shared_dynamic"] + row["shared_static"] <= aot.LIMITS[100].shared_block
        assert row["occupancy"]["blocks"] > 0
        assert not row["violations"] or "local memory" in " ".join(row["violations"])


@pytest.mark.parametrize(
    ("workload", "kernels"),
    [
        *((name, {"_forward", "_gradient", "_product"}) for name in report.WORKLOADS if name.startswith("linear")),
        ("goldfish_drop", {"goldfish_kernel"}),
        ("goldfish_keep_all", {"goldfish_kernel", "scatter_kernel"}),
        ("compact_rows", {"count_kernel", "scatter_kernel"}),
        ("rms_norm", {"rms_norm_forward", "rms_norm_backward"}),
        ("rotary_qkv", {"rotary_turn"}),
        ("swiglu", {"swiglu_forward", "swiglu_backward"}),
    ],
)
def test_a_workload_starts_its_kernels(compiled: Compiled, workload: str, kernels: set[str]) -> None:
    started = {row["kernel"] for row in compiled.kernels(workload, 90)}
    assert started >= kernels
    assert started - kernels <= {"count_kernel", "scatter_kernel"}


def test_the_loss_is_cut_up_as_the_cost_model_says(compiled: Compiled) -> None:
    """1 GiB holds 57344 columns of 8192 rows beside a slab; 64 blocks of rows by 8 splits are 512 programs."""
    rows = compiled.kernels("linear_cross_entropy", 90)
    (forward,) = (row for row in rows if row["kernel"] == "_forward")
    assert forward["grid"] == [64 * 8]
    (kept,) = (row for row in rows if variant(row, KEPT=True))
    assert kept["grid"] == [8192 // 32 * (57344 // 128)]
    (slab,) = (row for row in rows if variant(row, KEPT=False))
    assert slab["grid"] == [8192 // 128 * (8192 // 128)]


def variant(row: dict[str, Any], **constants: object) -> bool:
    return all(row["constants"].get(name) == value for name, value in constants.items())


def test_every_kind_of_gradient_and_product_is_compiled(compiled: Compiled) -> None:
    rows = [row for row in compiled.facts["kernels"] if row["kernel"] in report.PRODUCTS]
    for kept in (True, False):
        assert any(variant(row, KEPT=kept, BIAS_GRADIENT=True, SOFTCAP=True) for row in rows)
        assert any(variant(row, KEEP=kept) for row in rows)
    for count_rows, add in ((True, True), (True, False), (False, True), (False, False)):
        assert any(variant(row, COUNT_ROWS=count_rows, ADD=add) for row in rows)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_loss_reads_and_writes_in_128_bits(compiled: Compiled, arch: int) -> None:
    seen = set()
    for row in compiled.facts["kernels"]:
        if row["arch"] != arch or row["kernel"] not in report.PRODUCTS or "bf16" not in row["types"].values():
            continue
        seen.add(row["workload"])
        if row["kernel"] == "_product":
            # All but the count.
            assert row["wide_loads"] == row["loads"] - 1, row
            assert row["wide_stores"] == row["stores"], row
        elif row["constants"].get("KEPT"):
            # A tile of logits by 128 threads, eight at a time.
            tile = row["constants"]["BM"] * row["constants"]["BN"]
            assert row["wide_loads"] >= tile // 128 // 8 == row["wide_stores"], row
        else:
            # Both operands of a step; beside them stand the figures of single rows.
            step = (row["constants"]["BM"] + row["constants"]["BN"]) * row["constants"]["BK"]
            assert row["wide_loads"] >= step // (32 * row["warps"]) // 8, row
    assert {"linear_cross_entropy", "linear_cross_entropy_50257", "linear_cross_entropy_few_rows"} <= seen


@pytest.mark.parametrize("arch", [80, 90])
def test_elementwise_kernels_read_and_write_in_128_bits(compiled: Compiled, arch: int) -> None:
    for workload in ("rms_norm", "rms_norm_heads", "rotary", "rotary_qkv", "swiglu"):
        for row in compiled.kernels(workload, arch):
            # Narrow ones beside these: the scales of the rows, the weight of one head, the tables of cosines.
            assert row["wide_loads"] >= max(2, row["loads"] - 3), row
            assert row["wide_stores"] >= max(1, row["stores"] - 1), row


@pytest.mark.parametrize("arch", [80, 90])
def test_mask_kernels_leave_room_for_half_of_the_warps(compiled: Compiled, arch: int) -> None:
    for workload in (name for name in report.WORKLOADS if name.startswith(("goldfish", "compact"))):
        for row in compiled.kernels(workload, arch):
            assert row["registers"] <= 64, row
            assert row["occupancy"]["warps"] >= 32, row


def test_no_kernel_has_atomics(compiled: Compiled) -> None:
    assert {row["kernel"] for row in compiled.facts["kernels"] if row["atomics"]} == set()


@pytest.mark.parametrize("arch", [80, 90])
def test_a_good_kernel_passes(compiled: Compiled, arch: int) -> None:
    (row,) = compiled.kernels("standin_good", arch)
    assert compiled.broken("standin_good", arch) == []
    assert row["stack_bytes"] == row["spill_bytes"] == 0
    assert 64 <= row["registers"] <= 255
    assert (row["warps"], row["stages"], row["grid"]) == (8, 3, [8, 8])
    assert set(row["tensor_ops"]) == {"mma.sync" if arch == 80 else "wgmma"}
    # Tiles of 128 x 64 in bfloat16, two of them for each stage; sm_80 keeps one stage fewer.
    assert row["shared_dynamic"] == (2 if arch == 80 else 3) * 2 * 128 * 64 * 2
    assert row["shared_static"] == 0
    assert row["loads"] == row["wide_loads"] > 0
    assert row["stores"] == row["wide_stores"] == 128 * 128 // 256 // 8
    assert row["barriers"] > 0
    assert row["atomics"] == 0
    assert row["code_bytes"] > 1000


@pytest.mark.parametrize("arch", [80, 90])
def test_the_gate_finds_spills(compiled: Compiled, arch: int) -> None:
    (row,) = compiled.kernels("standin_spilling", arch)
    assert row["spill_bytes"] > 0
    (line,) = compiled.broken("standin_spilling", arch)
    assert f"{row['spill_bytes']} B of it spilled" in line
    assert f"attention: {line}" in compiled.output


@pytest.mark.parametrize("arch", [80, 90])
def test_the_gate_finds_too_much_shared_memory(compiled: Compiled, arch: int) -> None:
    (row,) = compiled.kernels("standin_large", arch)
    assert row["occupancy"] == {"blocks": 0, "warps": 0, "limited_by": "shared memory"}
    lines = " ".join(compiled.broken("standin_large", arch))
    assert f"{row['shared_dynamic']} B of shared memory, the limit is {(163 if arch == 80 else 227) * 1024}" in lines


@pytest.mark.parametrize("arch", [80, 90])
def test_the_gate_finds_a_product_without_tensor_cores(compiled: Compiled, arch: int) -> None:
    lines = compiled.broken("standin_copy", arch)
    assert len(lines) == 2
    assert all("without a tensor-core instruction" in line for line in lines)


def test_equal_specializations_are_compiled_once(compiled: Compiled) -> None:
    divisible, odd = compiled.kernels("standin_copy", 80)
    assert (divisible["grid"], odd["grid"]) == ([4], [5])
    assert divisible["wide_loads"] == divisible["loads"] > 0
    # The mask of a length that is not divisible by 16 may end within a vector.
    assert odd["wide_loads"] == odd["wide_stores"] == 0
    assert compiled.progress.count("standin_copy sm_80") == 2


def test_tables_show_every_kernel(compiled: Compiled) -> None:
    for row in compiled.facts["kernels"]:
        assert row["kernel"] in compiled.output
        assert row["arch"] == 100 or f"### {row['workload']}" in compiled.markdown
    assert "next: " in compiled.output.splitlines()[-1]


# Hand-computed from the tables of the CUDA C++ Programming Guide.
@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "columns", "expected"),
    [
        # 150 registers: 19 units of 256 a warp, 3 warps in each quarter of 16384, 12 an SM.
        (80, 150, 64 * 1024, 8, 0, (1, 8, "registers")),
        (80, 64, 0, 32, 0, (1, 32, "registers")),
        (80, 32, 0, 4, 0, (16, 64, "registers")),
        (80, 16, 0, 4, 0, (16, 64, "warps")),
        (80, 16, 0, 1, 0, (32, 32, "blocks")),
        # 164 KiB hold two of 80 + 1.
        (80, 40, 80 * 1024, 4, 0, (2, 8, "shared memory")),
        (80, 40, 163 * 1024, 4, 0, (1, 4, "shared memory")),
        (80, 40, 163 * 1024 + 1, 4, 0, (0, 0, "shared memory")),
        (90, 40, 163 * 1024 + 1, 4, 0, (1, 4, "shared memory")),
        (90, 40, 227 * 1024, 4, 0, (1, 4, "shared memory")),
        (100, 32, 0, 4, 256, (2, 8, "tensor memory")),
        (90, 255, 0, 16, 0, (0, 0, "registers")),
        (90, 128, 0, 16, 0, (1, 16, "registers")),
    ],
)
def test_occupancy(
    arch: int, registers: int, shared: int, warps: int, columns: int, expected: tuple[int, int, str]
) -> None:
    assert aot.occupancy(arch, registers, shared, warps, columns) == expected


def test_instructions_are_counted_by_kind() -> None:
    ptx = """
    .reqntid 256
    ld.param.b64 %rd1, [kernel_param_0];
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @!%p2 ld.global.L1::evict_last.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ];
    ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
    @%p1 ld.global.b32 %r5, [ %rd1 + 4 ];
    cp.async.cg.shared.global [ %r19 + 0 ], [ %rd2 + 0 ], 0x10, %r20;
    cp.async.ca.shared.global [ %r19 + 0 ], [ %rd2 + 0 ], 0x4, %r20;
    cp.async.commit_group;
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r2, %r3}], [%r4];
    st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
    st.shared.v4.b32 [ %r1 + 0 ], { %r1, %r2, %r3, %r4 };
    @%p3 st.global.b16 [ %rd1 + 0 ], { %rs1 };
    bar.sync 0;
    bar.warp.sync -1;
    barrier.cluster.arrive.aligned;
    atom.global.acq_rel.gpu.cas.b32 %r1, [ %rd1 ], %r2, %r3;
    red.global.add.f32 [ %rd1 ], %f1;
    atom.shared.add.u32 %r1, [ %r2 ], %r3;
    redux.sync.max.s32 %r1, %r2, %r3;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 { %f1 }, %rd1, %rd2, %p1, 1, 1, 0, 0;
    wgmma.fence.sync.aligned;
    @%p9 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
    """
    assert aot.instructions(ptx) == {
        "tensor_ops": {"mma.sync": 1, "wgmma": 1, "tcgen05": 1},
        "loads": 7,
        "wide_loads": 4,
        "stores": 3,
        "wide_stores": 2,
        "barriers": 2,
        "atomics": 2,
    }


def test_the_interpreter_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert report.main(["--arch", "80"]) == 2
    assert capsys.readouterr().err == "error: kernels cannot be compiled while TRITON_INTERPRET=1 is set: unset it\n"


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aot, "installed", lambda: False)
    assert report.main(["--arch", "80"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: triton is not installed: pip install")
    assert error.count("\n") == 1


def test_unknown_names_are_answered_with_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--kernels", "rms_morn"])
    assert "rms_norm" in capsys.readouterr().err


def test_no_jobs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--jobs", "0"])
    assert "--jobs: 0 must be at least 1" in capsys.readouterr().err


def test_the_package_does_not_import_triton() -> None:
    check = "import sys, megafish_kernels.report, megafish_kernels.cost; print('triton' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
