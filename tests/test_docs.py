"""Every command in the documentation exists with its options, every key with its name, every link with its target."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from megafish.cli import app
from megafish.config import Config, UnlearnConfig, dump_config, load_config, preset_names, with_help_text
from megafish.config_errors import field_help
from megafish.config_unlearn import OPTIONS
from megafish.jobs.profile import Profile
from megafish.sweep.expand import expand
from megafish.sweep.spec import load_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = field_help(Config)
JOB_KEYS = {f"slurm.{key}" for key in field_help(Profile)}
FILE_SUFFIXES = ("bin", "idx", "safetensors")


class Command(NamedTuple):
    page: str
    line: str
    arguments: list[str]


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[Command]:
    """Calls of megafish in the shell blocks and in the inline code of every page."""
    for page in PAGES:
        shell = "".join(text for language, text in blocks(page) if language in ("", "sh", "bash", "console"))
        lines = shell.replace("\\\n", " ").splitlines()
        lines += re.findall(r"`(megafish [^`\n]+)`", page.read_text(encoding="utf-8"))
        for line in lines:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if "megafish" in words[:6] and words[0] not in ("pip", "cd", "git"):
                arguments = words[words.index("megafish") + 1 :]
                if ">" in arguments:
                    arguments = arguments[: arguments.index(">")]
                yield Command(page.name, line, arguments)


COMMANDS = list(commands())


def test_no_place_holder_is_left() -> None:
    for page in PAGES:
        assert not re.findall(r"@[A-Z]+@", page.read_text(encoding="utf-8")), page.name


def test_there_are_commands_to_check() -> None:
    used = {command.arguments[0] for command in COMMANDS if command.arguments}
    assert {"tokenizer", "prepare", "train", "audit", "report", "generate", "schema", "demo"} <= used
    assert {"launch", "status", "logs", "cancel", "sweep"} <= used


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.line}")
def test_command_parses(command: Command) -> None:
    group: Any = typer.main.get_command(app)
    if command.arguments in (["--version"], ["--help"]):
        return
    context = group.make_context("megafish", list(command.arguments), resilient_parsing=True)
    name, subcommand, rest = group.resolve_command(context, list(command.arguments))
    assert subcommand is not None
    if not rest:
        return  # `megafish train` in a sentence names the command
    subcommand.make_context(name, list(rest), parent=context)
    overrides = [word for word in rest if re.match(r"[a-z_.]+=", word)]
    if name == "train" and rest[0] in preset_names():
        load_config(rest[0], overrides)
    for override in overrides:
        key = override.partition("=")[0]
        known = key in KEYS or key in JOB_KEYS or key.startswith("engine.deepspeed.")
        assert known, f"{key} is no key of the configuration"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_running_text_exist(page: Path) -> None:
    sections = "|".join({key.split(".")[0] for key in KEYS if "." in key})
    for key in re.findall(rf"`((?:{sections})\.[a-z_.]+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")):
        if key.rpartition(".")[2] not in FILE_SUFFIXES:
            assert key in KEYS or key.startswith("engine.deepspeed"), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_in_the_text_load(page: Path, tmp_path: Path) -> None:
    for language, text in blocks(page):
        if language == "yaml":
            (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
            load_config(tmp_path / "run.yaml")


def test_reference_is_what_print_config_prints() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    expected = dump_config(load_config("tiny"), with_help=True)
    assert f"```yaml\n{expected}```\n" in page, "put the output of `megafish train tiny --print-config` into the page"


def test_reference_of_job_settings_is_what_print_profile_prints() -> None:
    page = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    assert f"```text\n{with_help_text(Profile())}```\n" in page, (
        "put the output of `megafish launch slurm tiny --print-profile` into the page"
    )


def test_reference_of_unlearning_is_what_the_section_says() -> None:
    page = (ROOT / "docs" / "unlearn.md").read_text(encoding="utf-8")
    section = UnlearnConfig(model="/runs/tiny", forget=["/forget.jsonl"], retain=["/retain.jsonl"])
    assert f"```text\n{with_help_text(section)}```\n" in page, "put the section unlearn with its help into the page"


def test_unlearning_of_the_page_has_every_method() -> None:
    page = (ROOT / "docs" / "unlearn.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(OPTIONS)


def test_sweep_of_the_page_expands(tmp_path: Path) -> None:
    (text,) = (text for language, text in blocks(ROOT / "docs" / "sweeps.md") if language == "text")
    file = tmp_path / "sweep.yaml"
    file.write_text(text, encoding="utf-8")
    # 3 x 3 x 3 x 2 combinations without 6 excluded ones, twice.
    assert len(expand(load_sweep(file), file, ["data.train=corpus"])) == 96


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert re.match(r"https?://", target) or (page.parent / target).exists(), target


def test_presets_table_matches_the_presets() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([^|]+) \|$", page, re.MULTILINE))
    words = {"million": 10**6, "billion": 10**9, "trillion": 10**12}
    for name, budget in rows.items():
        number, unit = budget.split()
        assert load_config(name).train.supervised_tokens == float(number) * words[unit]
