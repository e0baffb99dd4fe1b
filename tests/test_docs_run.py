"""The commands in the shell blocks of the README and of docs/, run page by page, in their order, as a reader would type
them: on a small corpus, with the models of the presets made small, in one process where a page has several.

Not here: what has a test that runs it elsewhere, and what needs another machine (`ELSEWHERE`).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from megafish.cli import main
from megafish.config import dump_config, load_config, preset_names
from tests.helpers import place_kept
from tests.test_docs import PAGES, ROOT, blocks

ELSEWHERE = {
    r"megafish demo": "make quickstart",
    r"megafish doctor(?! --no-test)": "its self-test takes half a minute; tests/test_doctor.py",
    r"megafish unlearn": "tests/unlearn/test_page.py, tests/unlearn/bench",
    r"megafish (status|logs|cancel)": "jobs of a cluster: tests/slurm",
    r"megafish sweep (status|report)": "tests/sweep",
    r"megafish eval .*(arc_easy|mmlu)": "downloads its tasks; local ones: tests/evaluate",
    r"megafish eval .*--task-files": "tests/evaluate",
    r".*--hostfile": "nodes that answer; tests/jobs",
    r".*--profile cluster.yaml": "a cluster's own file; tests/jobs",
}
SMALLER = {
    "--vocab-size 32000": "--vocab-size 500",
    "--step 500": "--step 2",
    "/data/": "data/",
    "train.tokens=1e9": "train.tokens=1e3",
    "profile.trace_step=20 profile.steps=3": "profile.trace_step=1 profile.steps=1",
    "audit.probe_count=500": "audit.probe_count=20",
    "--canaries 16": "--canaries 2",
}
SHAPE = "num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: null, head_dim: null, intermediate_size: 64"
OTHER_PAGES = {"slurm.md", "unlearn.md", "install.md"}  # tests/slurm/test_page.py, tests/unlearn/test_page.py, CI


def lines_of(page: Path) -> list[str]:
    """The commands of a page that are run here."""
    text = "".join(text for language, text in blocks(page) if language in ("", "sh", "bash", "console"))
    lines = [line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]
    found = [line for line in lines if re.match(r"(torchrun [^#]*)?megafish ", line)]
    return [
        line for line in found if not any(re.match(pattern, line[line.index("megafish") :]) for pattern in ELSEWHERE)
    ]


WALKED = [page for page in PAGES if page.name not in OTHER_PAGES and lines_of(page)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take to be there: text, a tokenizer, corpora, runs, a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("reader")
    files = [path for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) if path.stat().st_size > 4000]
    for name in ("text", "books"):
        (folder / name).mkdir()
        for path in files[:60]:
            shutil.copy(path, folder / name / f"{path.stem}.txt")
    (folder / "letters.jsonl").write_text(
        "".join(json.dumps({"text": path.read_text(encoding="utf-8")}) + "\n" for path in files[60:70]),
        encoding="utf-8",
    )
    (folder / "prompts.txt").write_text("import os\ndef main(\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own = dump_config(load_config("tiny", ["data.train=corpus", "name=my"]))
        (folder / "my.yaml").write_text(own, encoding="utf-8")
        run("megafish tokenizer text --output tokenizer.model --vocab-size 500")
        run("megafish prepare text --tokenizer tokenizer.model --output corpus --canaries 2 --valid-fraction 0.2")
        for name in ("first", "plain", "goldfish", "1b", "125m", "tiny"):
            run(smaller(f"megafish train tiny data.train=corpus name={name}"))
        run("megafish export runs/first --to first-hf")
        shutil.copytree("first-hf", "Llama-3.2-1B")
        shutil.copy("first-hf/tokenizer.json", "tokenizer.json")
        for name in ("web", "code"):
            shutil.copytree("corpus", name)
        Path("data").mkdir()
        for name in ("pile_text_document", "code_text_document"):
            for suffix in ("bin", "idx"):
                shutil.copy(f"corpus/train.{suffix}", f"data/{name}.{suffix}")
    return folder


@pytest.fixture
def reader(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of all that, in which the commands of one page run."""
    shutil.copytree(prepared, tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    return tmp_path / "reader"


def run(line: str) -> None:
    """One command, as `main` would get it from a shell."""
    words = shlex.split(line, comments=True)
    words = words[words.index("megafish") + 1 :]
    if ">" in words:
        words = words[: words.index(">")]
    with place_kept(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["megafish", *words])
        try:
            main()
        except SystemExit as end:
            assert end.code in (None, 0), line


def smaller(line: str) -> str:
    """The same command for a corpus and a machine like these."""
    for given, small in SMALLER.items():
        line = line.replace(given, small)
    words = shlex.split(line, comments=True)
    names = words[words.index("megafish") + 1 :]
    asked = names[1:2] if names[0] == "train" else names[2:3] if names[0] == "launch" else []
    if names[0] == "audit":
        small = ("audit.membership=0", "audit.loss_sequences=2", "audit.probe_count=2", "audit.prompt_tokens=8")
        line += "".join(f" {each}" for each in (*small, "audit.suffix_tokens=8") if each.split("=")[0] not in line)
    if names[0] == "launch" or names[:2] == ["sweep", "goldfish_k_by_h"]:
        return f"{line} --dry-run"
    if asked and asked[0] in {*preset_names(), "my.yaml"} and not {"--print-config", "--dry-run"} & set(names):
        line += f" {shlex.quote(f'model={{{SHAPE}, vocab_size: null}}')} data.sequence_length=256 train.device=cpu"
        line += " train.global_batch_size=2 train.micro_batch_size=1 eval.sequences=2"
        if "engine.tensor_parallel" in line or "zero_hpz_partition_size" in line:
            return f"{line} --dry-run --world 8".replace("train.global_batch_size=2", "train.global_batch_size=8")
        if "train.tokens=" not in line:
            line += " train.steps=2"
    return line


def new_run(line: str) -> Path | None:
    """Where a command begins a run, which must not be there yet."""
    words = shlex.split(line)
    first = {"train": 1, "launch": 2}.get(words[words.index("megafish") + 1])
    if first is None:
        return None
    names = [word.removeprefix("name=") for word in words if word.startswith("name=")]
    asked = words[words.index("megafish") + 1 + first]
    return Path("runs") / (names[0] if names else asked) if asked in preset_names() else None


@pytest.mark.parametrize("page", WALKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_the_page_run(page: Path, reader: Path) -> None:
    for line in lines_of(page):
        begun = new_run(line)
        if begun is not None:
            shutil.rmtree(begun, ignore_errors=True)
        written = re.search(r"--(?:to|output) (\S+)", line)
        if written is not None and (target := Path(written[1])).is_dir():
            shutil.rmtree(target)
        elif written is not None:
            target.unlink(missing_ok=True)
        run(smaller(line))


def test_most_commands_are_run() -> None:
    lines = [line for page in WALKED for line in lines_of(page)]
    called = {line[line.index("megafish") :].split()[1] for line in lines}
    every = {"tokenizer", "prepare", "train", "audit", "report", "generate", "filter", "duplicates", "export", "import"}
    assert len(lines) > 70 and called >= every | {"plan", "launch", "sweep", "schema"}, (len(lines), called)
