"""The command line as a user meets it: help, the whole path, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megafish.cli import main
from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import train_tokenizer

COMMANDS = (
    "tokenizer",
    "prepare",
    "train",
    "verify",
    "generate",
    "export",
    "import",
    "audit",
    "report",
    "demo",
    "schema",
    "doctor",
)
SMALL = (
    "model={num_layers: 1, hidden_size: 32, num_heads: 2, intermediate_size: 48}",
    "data.sequence_length=32",
    "train={global_batch_size: 4, micro_batch_size: 2, steps: 2, supervised_tokens: null}",
    "eval={sequences: 2, dropped_sequences: 2}",
)

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run a command in this process, in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megafish", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert lines[-1].startswith("error: "), err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[-1], lines[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(call: Call, command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"megafish {command}" in out.split("Example")[1]


def test_help_imports_nothing_heavy() -> None:
    """What keeps `megafish --help` fast."""
    program = (
        "import sys; sys.argv = ['megafish', '--help']\n"
        "from megafish.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'deepspeed', 'numpy', 'pydantic', 'yaml', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert all(command in out for command in COMMANDS)
    assert out.splitlines()[-1] == "HEAVY []"


def test_the_path_of_the_readme(call: Call, tmp_path: Path) -> None:
    texts = tmp_path / "text"
    texts.mkdir()
    for number in range(12):
        lines = [f"line {number * 7 + n} says that {n} fish swim past {number} boats\n" for n in range(60)]
        (texts / f"{number}.txt").write_text("".join(lines))
    code, out, err = call("tokenizer", "text", "--output", "tokenizer.model", "--vocab-size", 320)
    assert code == 0 and "next: megafish prepare text --tokenizer tokenizer.model" in out, err
    options = ("--canaries", 1, "--canary-exposures", "0,2", "--canary-tokens", 24, "--valid-fraction", 0.3)
    code, out, err = call("prepare", "text", "--tokenizer", "tokenizer.model", "--output", "corpus", *options)
    assert code == 0 and "next: megafish train tiny data.train=corpus" in out, err
    code, out, err = call("train", "tiny", "data.train=corpus", "run_dir=runs/a", *SMALL)
    assert code == 0 and "next: megafish audit runs/a" in out, err
    code, out, err = call("audit", "runs/a", "audit.prompt_tokens=12", "audit.suffix_tokens=8")
    assert code == 0 and "next: megafish report runs/a" in out, err
    code, out, err = call("report", "runs/a")
    assert code == 0 and (tmp_path / "runs/a/report.html").is_file(), err
    code, out, err = call("generate", "runs/a", "--prompt", "line 7 says", "--max-new-tokens", 4)
    assert code == 0 and out.startswith("line 7 says"), err
    again = call("generate", "runs/a", "--prompt", "line 7 says", "--prompt", "x", "--max-new-tokens", 4, "--json")[1]
    first, second = (json.loads(line) for line in again.splitlines())
    assert first["prompt"] + first["continuation"] + "\n" == out and second["prompt"] == "x"
    code, out, err = call("verify", "runs/a")
    assert code == 0 and "good" in out and "next: megafish train runs/a\n" in out, err
    (tmp_path / "runs/a/checkpoints/step_00000002/state.json").unlink()
    code, out, err = call("verify", "runs/a")
    assert code == 1 and "damaged" in out and "next: start a new run" in out, err


def test_print_config_is_a_configuration(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("train", "tiny", "goldfish.k=7", "--print-config")
    assert code == 0
    (tmp_path / "mine.yaml").write_text(out)
    assert call("train", "mine.yaml", "--print-config") == (0, out, "")


def test_schema_is_json(call: Call) -> None:
    code, out, _ = call("schema")
    assert code == 0 and "goldfish" in json.loads(out)["properties"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "tinny"), ("tinny", "tiny")),
        (("train", "tiny", "train.lr=1"), ("train.lr", "optimizer.lr")),
        (("train", "tiny", "goldfish.k=1"), ("goldfish.k", "1")),
        (("train", "tiny", "goldfish.h=0"), ("goldfish.h", "0")),
        (("train", "tiny", "optimizer.lr"), ("optimizer.lr", "=")),
        (("train", "tiny"), ("data.train", "megafish prepare")),
        (("train", "tiny", "data.train=nowhere"), ("nowhere",)),
        (("train", "."), ("not a run directory",)),
        (("audit", "nowhere"), ("nowhere", "not a run directory")),
        (("report", "nowhere"), ("nowhere", "not a run directory")),
        (("generate", "nowhere", "--prompt", "x"), ("nowhere", "not a run directory")),
        (("verify", "nowhere"), ("nowhere", "not a run directory")),
        (("generate", "nowhere"), ("--prompt",)),
        (("generate", "nowhere", "--prompt", "x", "--top-k", "5"), ("--top-k 5", "--temperature 1")),
        (("generate", "nowhere", "--prompt", "x", "--top-p", "0.5"), ("--top-p 0.5", "--temperature 1")),
        (("tokenizer", "nowhere", "--output", "t.model"), ("nowhere",)),
    ],
)
def test_mistakes_get_one_line(call: Call, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(call(*arguments), *words)


def test_a_prompt_file_with_an_empty_line(call: Call, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\nthree\n")
    assert_refused(call("generate", "nowhere", "--prompt-file", str(tmp_path / "prompts.txt")), "prompts.txt: line 2")


def test_a_hugging_face_folder_is_no_run(call: Call, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert_refused(call("report", str(tmp_path)), "a Hugging Face folder", f"megafish import {tmp_path} --to RUN")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latin.txt", b"caf\xe9 au lait\n" * 10, ("latin.txt", "UTF-8")),
        ("broken.jsonl", b'{"text": "fine"}\n{"txt": "not there"}\n', ("broken.jsonl", "2", "text")),
        ("cut.jsonl", b'{"text": "fine"}\n{"text": "cut of', ("cut.jsonl", "2")),
        ("empty.txt", b"", ()),
        ("noise.parquet", b"PAR1 but not really", ("noise.parquet",)),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00 but not really", ("cut.jsonl.gz",)),
    ],
)
def test_bad_text_is_named(
    call: Call, corpus: Path, tmp_path: Path, name: str, content: bytes, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    result = call("prepare", name, "--tokenizer", corpus / "tokenizer.model", "--output", "out", "--workers", 1)
    assert_refused(result, *words)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    """A corpus that may be damaged."""
    return Path(shutil.copytree(corpus, tmp_path / "copied"))


def train_on(call: Call, corpus: Path, *more: str) -> tuple[int, str, str]:
    return call("train", "tiny", f"data.train={corpus}", "run_dir=run", *SMALL, *more)


def test_a_truncated_bin_is_named(call: Call, copied: Path) -> None:
    with open(copied / "train.bin", "r+b") as handle:
        handle.truncate(1000)
    assert_refused(train_on(call, copied), "train.bin", "1000")


def test_a_wrong_magic_is_named(call: Call, copied: Path) -> None:
    with open(copied / "train.idx", "r+b") as handle:
        handle.write(b"NOTMAGIC!")
    assert_refused(train_on(call, copied), "train.idx", "magic")


def test_another_tokenizer_is_refused(call: Call, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("some words to learn other pieces from, again and again. " * 400)
    train_tokenizer([tmp_path / "other.txt"], tmp_path / "other.model", 300, options=ReadOptions(), progress=False)
    result = train_on(call, copied, f"data.tokenizer={tmp_path / 'other.model'}")
    assert_refused(result, "other.model", "not the tokenizer")


def test_batches_that_do_not_divide_are_refused(call: Call, corpus: Path) -> None:
    assert_refused(train_on(call, corpus, "train.global_batch_size=5"), "global_batch_size=5", "micro_batch_size=2")


def test_ctrl_c_is_said(tmp_path: Path) -> None:
    """On a pipe that nobody writes to, the command waits until it is interrupted."""
    os.mkfifo(tmp_path / "text.txt")
    command = [sys.executable, "-m", "megafish", "tokenizer", str(tmp_path / "text.txt"), "--output", "t.model"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "text.txt", "w"):  # opens once the command reads
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.strip() == "interrupted"


def test_a_model_goes_out_comes_back_and_is_trained_on(call: Call, corpus: Path) -> None:
    pytest.importorskip("transformers")
    assert call("train", "tiny", f"data.train={corpus}", "run_dir=run", *SMALL)[0] == 0
    code, out, err = call("export", "run", "--to", "hf")
    assert code == 0, err
    assert "LlamaForCausalLM" in out and "next: python -c" in out
    assert_refused(call("export", "run", "--to", "hf"), "hf", "not an empty folder")
    code, out, err = call("import", "hf", "--to", "back")
    assert code == 0, err
    assert "next: megafish generate back" in out
    assert_refused(call("import", "hf", "--to", "back"), "back", "not an empty folder")
    assert_refused(
        call("train", "back", f"data.train={corpus}", *SMALL[1:]),
        "no optimizer state",
        "megafish train back/config.yaml",
    )
    assert call("generate", "back", "--prompt", "def", "--max-new-tokens", "4")[0] == 0
    overrides = ("name=on", f"data.train={corpus}", "run_dir=on", *SMALL[1:])
    code, out, err = call("train", "back/config.yaml", *overrides)
    assert code == 0, err
    assert "on starts from" in " ".join((out + err).split())
    first = json.loads(Path("on/metrics.jsonl").read_text().splitlines()[0])
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < last["loss"], "it starts where the first run ended"
