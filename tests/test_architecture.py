"""The rules between the rooms: a room imports only rooms below it, heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. Rooms on one line may not import each other.
LEVELS = [
    {"command_group", "errors", "progress"},
    {"launcher"},
    {"processes"},
    {"config_yaml"},
    {"config_deepspeed", "config_errors", "config_megatron"},
    {"config_sections"},
    {"config_audit", "config_unlearn"},
    {"config"},
    {"run"},
    {"life"},
    {"data"},
    {"model"},
    {"objective"},
    {"decode", "huggingface", "plan"},
    {"train"},
    {"jobs"},
    {"audit", "evaluate"},
    {"unlearn"},
    {"sweep"},
    {"demo", "doctor"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: height for height, rooms in enumerate(LEVELS) for room in rooms}

# Module: the only files that may import it.
ONLY_IN = {
    "deepspeed": {"megafish/train/engine.py"},
    "wandb": {"megafish/train/track.py"},
    "lm_eval": {"megafish/evaluate/harness.py", "megafish/evaluate/lm.py"},
    "triton": set(),
}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "megafish").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(ROOT / "megafish"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    assert own in LEVEL, f"{path}: which level is {own} on?"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "megafish" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != own:
            assert LEVEL[parts[1]] < LEVEL[own], f"{own} imports {name}, which is not below it"


def test_kernels_know_nothing_of_the_trainer() -> None:
    for path in modules(ROOT / "kernels"):
        assert [name for name in imports(path) if name.split(".")[0] == "megafish"] == [], path


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in modules(ROOT / "megafish")
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert found == ONLY_IN[library]


def test_command_line_imports_nothing_heavy() -> None:
    check = "import sys, megafish.cli; print(*(m for m in ('torch', 'numpy', 'pydantic', 'yaml') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
