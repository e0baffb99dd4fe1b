"""`megafish doctor` on this machine, on one without optional packages, and on broken ones."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from megafish.cli import app
from megafish.doctor import packages, parts, probe, report, selftest
from megafish.doctor.child import ask, error_line
from megafish.doctor.packages import PACKAGES, Found, Package, look_at, package_part
from megafish.doctor.part import Part
from megafish.doctor.probe import Torch
from megafish.model import attention

ROOT = Path(__file__).parents[1]
OPTIONAL = [package.name for package in PACKAGES if not package.required]

# Hides packages from a process and from those that it starts: neither metadata nor modules are found.
HIDE = """
import importlib.metadata, os, sys
from importlib.machinery import PathFinder
hidden = set(os.environ["HIDDEN"].split(","))
found = importlib.metadata.distribution
def distribution(name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.distribution = distribution
find_spec = PathFinder.find_spec
def hiding(name, path=None, target=None):
    return None if name.split(".")[0].replace("_", "-") in hidden else find_spec(name, path, target)
PathFinder.find_spec = staticmethod(hiding)
"""


def doctor(*options: str, folder: Path, **environment: str) -> tuple[int, str]:
    """(exit code, output) of the command in a process of its own, called in a folder."""
    done = subprocess.run(
        [sys.executable, "-m", "megafish", "doctor", *options],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout + done.stderr


def test_without_any_optional_package(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    (tmp_path / "wandb").mkdir()  # what wandb leaves in the folder of a run
    code, output = doctor("--json", folder=tmp_path, PYTHONPATH=str(tmp_path), HIDDEN=",".join(OPTIONAL))
    assert code == 0, output
    found: dict[str, Any] = json.loads(output)
    assert found["healthy"] and found["next"].startswith("megafish demo")
    by_name = {part["name"]: part for part in found["parts"]}
    assert {name for name in OPTIONAL if by_name[name]["state"] in ("missing", "unused")} == set(OPTIONAL)
    pins = f"-c {ROOT}/constraints.txt " if (ROOT / "constraints.txt").is_file() else ""
    assert by_name["wandb"]["remedy"] == f"pip install {pins}'megafish[wandb]'"
    assert by_name["attention"]["detail"] and by_name["kernels"]["detail"]
    assert re.search(r"cpu_adam (built|buildable|not buildable)", by_name["DeepSpeed's operators"]["detail"])
    passed = [(check["name"], check["passed"]) for check in found["checks"]]
    assert passed == [("mask", True), ("loss", True), ("collective", True), ("training", True)]


def test_broken_and_missing_packages_beside_files_of_their_names(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "wandb").mkdir(parents=True)
    (site / "sitecustomize.py").write_text(HIDE)
    # To rich, the start of the message is a tag that was never opened.
    (site / "wandb" / "__init__.py").write_text("raise RuntimeError('[/usr/lib/libc.so] built for another libc')")
    (tmp_path / "tokenizers.py").write_text("raise RuntimeError('a file of the user, no package')")
    hidden = ",".join({*OPTIONAL, "sentencepiece"} - {"wandb"})
    code, output = doctor(folder=tmp_path, PYTHONPATH=str(site), HIDDEN=hidden)
    assert code == 1
    assert "RuntimeError: [/usr/lib/libc.so] built for another libc" in output
    assert "pip install --force-reinstall --no-deps wandb==" in output
    assert "a file of the user" not in output
    assert "not able to work: sentencepiece\n" in output
    assert "self-test" not in output, "it would only say so again"
    last = output.rstrip().splitlines()[-1]
    assert re.fullmatch(r"next: pip install (-c \S+ )?megafish && megafish doctor", last)
    assert not set("│┌─") & set(output), "plain where it is no terminal"


def test_torch_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: not found\\n\\nSee: the web')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = probe.look()
    assert seen.error == "ImportError: libcudart.so.13: not found" and not seen.version
    package = PACKAGES[0]
    part = package_part(package, look_at(package), seen)
    assert part.fault and "libcudart.so.13: not found" in part.detail
    assert part.remedy is not None and re.fullmatch(
        r"pip install --force-reinstall --no-deps torch==[\d.]+", part.remedy
    )


def test_a_package_that_lacks_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_pins", lambda: [])
    package = next(package for package in PACKAGES if package.name == "deepspeed")
    for module, remedy in (
        ("torch", "pip install megafish"),
        ("hjson", "pip install megafish"),
        ("deepspeed.ops", "pip install --force-reinstall --no-deps deepspeed==0.19.8"),
    ):
        found = Found("broken", "0.19.8", f"ModuleNotFoundError: No module named '{module}'")
        assert package_part(package, found, Torch()).remedy == remedy


def test_what_a_process_says_of_its_end() -> None:
    assert ask("print(1)", 20).output == "1\n"
    assert ask("import os; os.abort()", 20).failure == "killed by SIGABRT"
    assert ask("import os; os._exit(3)", 20).failure == "exit code 3"
    assert ask("import time; time.sleep(60)", 0.3).failure == "no answer after 0.3 s"
    assert ask("raise SystemExit('off by a lot')", 20).failure == "off by a lot"
    assert error_line("ValueError: handled before\nthe end\n\n") == "the end"
    assert error_line("") == ""


def test_a_package_without_metadata_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "built_by_hand").mkdir()
    package = Package("built-by-hand", "built_by_hand", "", extra="cuda")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert look_at(package).state == "missing", "a folder is no package"
    (tmp_path / "built_by_hand" / "__init__.py").write_text("")
    sys.path_importer_cache.clear()
    assert look_at(package) == Found("ok", "unknown version")


def selftest_stub(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Python code that the checks' processes run before they begin; `check` and `rank` are theirs."""
    (folder / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'megafish.doctor.selftest import main' in sys.orig_argv[-3]:\n"
        "    check, rank = sys.orig_argv[-2], os.environ['RANK']\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_check_that_fails_crashes_or_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    selftest_stub(
        tmp_path,
        monkeypatch,
        "if check == 'mask': os.abort()\n"
        "if check == 'loss': print('x' * 300_000 + '\\noff by a lot', flush=True); os._exit(7)\n"
        "if check == 'training': time.sleep(600)\n"
        "if rank == '1': print('the real reason', flush=True); os._exit(1)\n"
        "time.sleep(600)",
    )
    monkeypatch.setattr(selftest, "SECONDS", 2)
    mask, loss, collective, training = selftest.run_checks()
    assert not mask.passed and "SIGABRT" in mask.detail
    assert not loss.passed and loss.detail == "off by a lot (exit code 7)"
    assert not collective.passed and collective.detail == "the real reason", "not the silence of its fellow"
    assert collective.seconds < 2
    assert not training.passed and training.detail == "no answer after 2 s"


def test_exit_code_of_a_failing_self_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    selftest_stub(tmp_path, monkeypatch, "os._exit(9 if check == 'loss' else 0)")
    monkeypatch.setattr(report, "inspect_machine", lambda folder: ([], Torch("2.13.0")))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert not found["healthy"] and [check["passed"] for check in found["checks"]] == [True, False, True, True]
    assert CliRunner().invoke(app, ["doctor", "--no-test"]).exit_code == 0


def test_ctrl_c_takes_the_checks_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    selftest_stub(tmp_path, monkeypatch, "time.sleep(600)")
    code = "from megafish.doctor.selftest import run_checks; run_checks()"
    doctor = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while len(children) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            children = psutil.Process(doctor.pid).children()
        assert len(children) == 2
        doctor.send_signal(signal.SIGINT)
        doctor.wait(10)
        assert not psutil.wait_procs(children, timeout=5)[1]
    finally:
        for process in children:
            if process.is_running():
                process.kill()
        doctor.kill()
        doctor.wait()


def test_mask_and_loss_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_DROPPED", "00" * 16)
    with pytest.raises(SystemExit, match="NumPy: drops 0000100d44a010a884820100940a0582, the contract 0000"):
        selftest.check_mask()
    import megafish_kernels

    true_loss = megafish_kernels.linear_cross_entropy
    monkeypatch.setattr(megafish_kernels, "linear_cross_entropy", lambda *inputs: true_loss(*inputs) * 1.01)
    with pytest.raises(SystemExit, match=r"the fused loss on .* is off by 1.0e-02"):
        selftest.check_loss()


def test_remedies_are_not_wrapped_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "pip install " + " ".join(f"package-{number}==1.0" for number in range(20))
    part = Part("packages", "wandb", "missing", "[/] [bold]", "track.wandb", remedy=remedy)
    monkeypatch.setattr(report, "inspect_machine", lambda folder: ([part], Torch("2.13.0")))
    text = io.StringIO()
    assert report.examine(test=False, console=Console(file=text, width=60, force_terminal=True, color_system=None))
    assert remedy in text.getvalue() and "[/] [bold]" in text.getvalue() and "│" in text.getvalue()


GPU = Torch("2.13.0", "13.0", "2.28.9", True, (("NVIDIA H100 80GB HBM3", 80 << 30, 9, 0),), "flash-attn", "triton")
CPU = Torch("2.13.0+cpu", gloo=True, kernels="torch")


@pytest.mark.parametrize(
    ("name", "seen", "state", "remedy"),
    [
        ("flash-attn", GPU, "missing", "pip install --no-build-isolation 'megafish[cuda]'"),
        ("flash-attn", CPU, "unused", None),
        ("triton", GPU, "missing", "pip install 'megafish[dev]'"),
        ("triton", CPU, "unused", None),
        ("megatron-core", GPU, "unused", None),
        ("torch", GPU, "missing", "pip install megafish"),
    ],
)
def test_what_a_gpu_needs_is_missing_only_with_one(
    name: str, seen: Torch, state: str, remedy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_pins", lambda: [])
    package: Package = next(package for package in PACKAGES if package.name == name)
    part: Part = package_part(package, Found("missing"), seen)
    assert (part.state, part.remedy) == (state, remedy)
    assert part.fault == (name == "torch")


@pytest.mark.parametrize(
    ("maker", "told"), [("_flash_attn_kernel", "flash-attn"), ("_torch_kernel", "torch's varlen_attn")]
)
def test_attention_kernels_are_told_apart(maker: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=None))
    kernel = getattr(attention, maker).__wrapped__()
    if kernel is None:
        pytest.skip("this torch has no such kernel")
    monkeypatch.setattr(attention, "_varlen_kernel", lambda *inputs: kernel)
    assert probe._model_parts(torch.device("cpu"))[0] == told


def test_whether_triton_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    package = next(package for package in PACKAGES if package.name == "triton")
    assert "in use" in package_part(package, Found("ok", "3.7.1"), GPU).detail
    assert "idle" in package_part(package, Found("ok", "3.7.1"), CPU).detail
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    without = Torch("2.13.0", "13.0", gpus=GPU.gpus, kernels="torch")
    part = package_part(package, Found("ok", "3.7.1"), without)
    assert (part.state, part.remedy) == ("broken", "unset TRITON_INTERPRET")


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (found,) = parts._gpu(CPU)
    assert found.state == "broken" and "lists 2, but torch 2.13.0+cpu is a CPU build" in found.detail
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (found,) = parts._gpu(Torch("2.13.0", "13.0"))
    assert (found.state, found.remedy) == ("broken", "unset CUDA_VISIBLE_DEVICES")
    smi.write_text("#!/bin/sh\necho 'no driver' >&2; exit 9\n")
    (found,) = parts._gpu(CPU)
    assert found.state == "unused", "the program alone is no GPU"
    (gpu,) = parts._gpu(GPU)
    assert "80 GiB, compute capability 9.0" in gpu.detail
    assert next(part for part in parts._processes(GPU) if part.name == "NCCL").detail == "2.28.9"


def test_requirements_are_those_of_the_package() -> None:
    """Every optional package is an extra of setup.py, every other one a requirement, and none of these is left out."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    required = text[text.index("install_requires") : text.index("extras_require")]
    named = set(re.findall(r'"([\w-]+)>=', required)) - {"typer", "rich"}  # without which there is no doctor
    assert named == {package.name for package in PACKAGES if package.required}
    for package in PACKAGES:
        if package.extra is not None:
            extra = text[text.index(f'"{package.extra}": [') :]
            assert f'"{package.name}' in extra[: extra.index("]")], package.name
