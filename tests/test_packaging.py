"""The wheel holds what an installation needs, and the pinned versions cover what it asks for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megafish

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "megafish_kernels"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the repository holds of its packages."""
    copy = tmp_path_factory.mktemp("build") / "megafish"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in ("megafish", "kernels", "configs", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=skipped, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def built(folder: Path, kind: str = "wheel") -> Path:
    """The wheel or sdist that setuptools makes of a folder, without the network."""
    build = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built(checkout))


@pytest.fixture(scope="module")
def kernels_wheel(checkout: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built(checkout / "kernels"))


def test_wheel_holds_every_module_and_preset(wheel: zipfile.ZipFile) -> None:
    expected = {f"megafish/{path.relative_to(ROOT / 'megafish')}" for path in (ROOT / "megafish").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT / "kernels")) for path in KERNELS.rglob("*.py")}
    expected |= {
        f"megafish/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")
    }
    expected |= {f"megafish/launch/{path.name}" for path in (ROOT / "launch").iterdir()}
    for room in ("audit", "sweep"):
        pages = (ROOT / "megafish" / room / "templates").iterdir()
        expected |= {f"megafish/{room}/templates/{path.name}" for path in pages}
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


def test_kernels_wheel_holds_the_kernels_alone(kernels_wheel: zipfile.ZipFile) -> None:
    names = set(kernels_wheel.namelist())
    expected = {str(path.relative_to(KERNELS.parent)) for path in KERNELS.rglob("*.py")}
    assert expected | {"megafish_kernels/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {
        "megafish_kernels",
        f"megafish_kernels-{megafish.__version__}.dist-info",
    }


def test_kernels_wheel_asks_for_torch_and_numpy_alone(kernels_wheel: zipfile.ZipFile) -> None:
    folder = f"megafish_kernels-{megafish.__version__}.dist-info"
    metadata = kernels_wheel.read(f"{folder}/METADATA").decode()
    assert "\nName: megafish-kernels\n" in metadata
    assert f"\nVersion: {megafish.__version__}\n" in metadata
    assert (KERNELS.parent / "README.md").read_text(encoding="utf-8").splitlines()[0] in metadata
    required = [Requirement(text) for text in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)]
    assert {entry.name for entry in required if entry.marker is None} == {"torch", "numpy"}
    (triton,) = [entry for entry in required if entry.marker is not None]
    assert triton.name == "triton"
    assert triton.marker is not None and triton.marker.evaluate({"extra": "triton", "platform_system": "Linux"})
    licence = kernels_wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_both_wheels_ask_for_the_same_torch_and_numpy(wheel: zipfile.ZipFile, kernels_wheel: zipfile.ZipFile) -> None:
    def ranges(archive: zipfile.ZipFile) -> dict[str, str]:
        (path,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        lines = re.findall(r"^Requires-Dist: ((?:torch|numpy)[^;\n]*)$", archive.read(path).decode(), re.MULTILINE)
        return {Requirement(line).name: str(Requirement(line).specifier) for line in lines}

    assert ranges(kernels_wheel) == ranges(wheel)
    assert set(ranges(wheel)) == {"torch", "numpy"}


def test_kernels_install_from_their_sdist(checkout: Path, tmp_path: Path) -> None:
    # Outside the repository the version's file is not there: an sdist carries it in its metadata.
    with tarfile.open(built(checkout / "kernels", "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert built(folder).name.startswith(f"megafish_kernels-{megafish.__version__}-")


@pytest.mark.parametrize("target", ["quickstart", "test", "lint", "types", "bench", "gpu", "clean", "help"])
def test_makefile_has_the_target(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
