"""The wheel holds what an installation needs, and the pinned versions cover what it asks for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megafish

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the checkout, without the network."""
    copy = tmp_path_factory.mktemp("build") / "megafish"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("megafish", "kernels", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(copy / "dist" / done.stdout.split()[-1])


def test_wheel_holds_every_module_and_preset(wheel: zipfile.ZipFile) -> None:
    expected = {f"megafish/{path.relative_to(ROOT / 'megafish')}" for path in (ROOT / "megafish").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    expected |= {
        f"megafish/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")
    }
    expected |= {f"megafish/audit/templates/{path.name}" for path in (ROOT / "megafish/audit/templates").iterdir()}
    expected |= {"megafish/py.typed", "megafish_kernels/py.typed"}
    assert expected - set(wheel.namelist()) == set()


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "megafish",
        "megafish_kernels",
        f"megafish-{megafish.__version__}.dist-info",
    }


def test_presets_are_found_in_an_unpacked_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    # The first entry of the path is the working directory: it goes before an editable install's finder only when the
    # finder is taken out.
    check = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]; "
        "import megafish.config as c; print(c.__file__, *c.preset_names(), c.load_config('1b').name)"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    place, *names = done.stdout.split()
    assert Path(place).is_relative_to(tmp_path)
    assert names == ["125m", "1b", "350m", "7b", "8b", "tiny", "1b"]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_constraints_pin_every_requirement_to_a_version_it_allows(wheel: zipfile.ZipFile, python: str) -> None:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                (version,) = pin.specifier
                assert version.operator == "=="
                pins[canonicalize_name(pin.name)] = version.version
    metadata = wheel.read(f"megafish-{megafish.__version__}.dist-info/METADATA").decode()
    required = [Requirement(text) for text in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)]
    assert len(required) > 20
    for requirement in required:
        if requirement.marker is not None and requirement.marker.evaluate({"extra": "cuda"}):
            continue  # flash-attn is built against the CUDA at hand
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert "triton" not in pins


@pytest.mark.parametrize("target", ["quickstart", "test", "lint", "types", "bench", "clean", "help"])
def test_makefile_has_the_target(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
