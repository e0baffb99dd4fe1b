"""`megafish doctor` on this machine, on one without optional packages, and on broken ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megafish.doctor import parts, selftest
from megafish.doctor.parts import PACKAGES, Package, Part, Torch

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


def doctor(*options: str, **environment: str) -> tuple[int, str]:
    """(exit code, output) of the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "megafish", "doctor", *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "160", **environment},
    )
    return done.returncode, done.stdout + done.stderr


def test_without_any_optional_package(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    optional = [package.name for package in PACKAGES if package.extra is not None]
    code, output = doctor("--json", PYTHONPATH=str(tmp_path), HIDDEN=",".join(optional))
    assert code == 0, output
    found: dict[str, Any] = json.loads(output)
    assert found["healthy"]
    by_name = {part["name"]: part for part in found["parts"]}
    assert {name for name in optional if by_name[name]["state"] in ("missing", "unused")} == set(optional)
    assert by_name["wandb"]["remedy"] == "pip install 'megafish[wandb]'"
    assert [(check["name"], check["passed"]) for check in found["checks"]] == [
        ("mask", True),
        ("loss", True),
        ("training", True),
    ]


def test_a_required_package_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    code, output = doctor(PYTHONPATH=str(tmp_path), HIDDEN="sentencepiece")
    assert code == 1
    assert "not able to work: sentencepiece" in output and "pip install megafish" in output
    assert "self-test" not in output, "it would only say so again"


def test_a_package_that_is_broken_is_told(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise RuntimeError('built for another libc')")
    code, output = doctor("--no-test", PYTHONPATH=str(tmp_path))
    assert code == 0, "nothing that is required"
    assert "RuntimeError: built for another libc" in output
    assert "pip install --force-reinstall --no-deps wandb==" in output
    assert output.rstrip().endswith("next: megafish demo (the whole path on real text, minutes)")


def test_a_check_that_fails_crashes_or_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if '-m' in sys.orig_argv and 'megafish.doctor.selftest' in sys.orig_argv:\n"
        "    check = sys.orig_argv[-2]\n"
        "    if check == 'mask': os.abort()\n"
        "    if check == 'loss': print('off by a lot'); os._exit(1)\n"
        "    if check == 'training': time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(selftest, "SECONDS", 2)
    monkeypatch.setattr(selftest, "_processes", lambda: 2)
    mask, loss, training = selftest.run_checks()
    assert not mask.passed and "SIGABRT" in mask.detail
    assert not loss.passed and loss.detail == "off by a lot (exit code 1)"
    assert not training.passed and training.detail == "no answer after 2 s"


GPU = Torch("2.13.0", "13.0", 8, "2.28.9", True, (("NVIDIA H100 80GB HBM3", 80 << 30, 9, 0),))


@pytest.mark.parametrize(
    ("name", "torch", "state", "remedy"),
    [
        ("flash-attn", GPU, "missing", "pip install --no-build-isolation 'megafish[cuda]'"),
        ("flash-attn", Torch("2.13.0"), "unused", None),
        ("triton", GPU, "missing", "pip install 'megafish[dev]'"),
        ("triton", Torch("2.13.0"), "unused", None),
        ("torch", GPU, "missing", "pip install megafish"),
    ],
)
def test_what_a_gpu_needs_is_missing_only_with_one(name: str, torch: Torch, state: str, remedy: str | None) -> None:
    package: Package = next(package for package in PACKAGES if package.name == name)
    part: Part = parts._package_part(package, "missing", "", torch)
    assert (part.state, part.remedy) == (state, remedy)
    assert part.fault == (name == "torch")


def test_a_cpu_build_beside_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.shutil, "which", lambda program: f"/usr/bin/{program}")
    (found,) = parts._gpu(Torch("2.13.0+cpu", gloo=True))
    assert found.state == "broken" and "CPU build" in found.detail and found.remedy is not None
    gpu, nccl = parts._gpu(GPU)
    assert "80 GiB, compute capability 9.0" in gpu.detail and nccl.detail == "NCCL 2.28.9"


def test_requirements_are_those_of_the_package() -> None:
    """Every optional package is an extra of setup.py, every other one a requirement."""
    text = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    required = text[text.index("install_requires") : text.index("extras_require")]
    for package in PACKAGES:
        if package.extra is None:
            assert f'"{package.name}>=' in required, package.name
        else:
            extra = text[text.index(f'"{package.extra}": [') :]
            assert f'"{package.name}' in extra[: extra.index("]")], package.name
