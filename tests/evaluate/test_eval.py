"""megafish eval beside lm-eval's own class on the export: the same figures, and one line for what cannot be done."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megafish.cli import main
from megafish.config import Config
from megafish.decode.generate import generate
from megafish.errors import InputError
from megafish.evaluate.harness import Evaluated, evaluate_run
from megafish.evaluate.lm import RunLM, max_length
from megafish.huggingface.export import export
from megafish.model.load import load_run
from megafish.run import RunDir
from tests.evaluate.helpers import CHOICES, TASKS, bos_run, code, trained_run, values, write_tasks
from tests.helpers import finish, start


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing by a second thread, and wait for it where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> RunDir:
    return trained_run(tmp_path_factory.mktemp("run"), corpus)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.getbasetemp() / "datasets"
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))  # for other processes: here datasets has read it already
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


def evaluated(run: RunDir, tasks: Path, **options: Any) -> dict[str, Any]:
    done = evaluate_run(run.path, TASKS, task_files=tasks, device="cpu", progress=False, **options)
    assert isinstance(done, Evaluated)
    assert json.loads(done.file.read_text(encoding="utf-8"))["results"] == done.results["results"]
    return done.results


def peer_of(run: RunDir, folder: Path, **options: Any) -> HFLM:
    export(run.path, folder, progress=False)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", **options)


def of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("task", number, 1))
        for number, args in enumerate(arguments)
    ]


SPECIAL = "</s> <s> is text", "<|begin_of_text|>so", "<s>so"


@pytest.mark.parametrize("which", ["trained", "bos"])
def test_answers_are_those_of_lm_evals_own_class(which: str, trained: RunDir, tmp_path: Path) -> None:
    run = trained if which == "trained" else bos_run(tmp_path / "bos")
    peer = peer_of(run, tmp_path / "hf", batch_size=1)
    ours = RunLM(load_run(run.path, device="cpu"), batch_size=5, progress=False)
    assert ours.max_length == peer.max_length == 64
    assert ours.prefix_token_id == peer.prefix_token_id and ours.eot_token_id == peer.eot_token_id
    text = code()
    contexts = ["", "def ", "def  \n", text[:30], text[100:700], text[:30], *SPECIAL, "é" * 50]
    pairs = [(before, after) for before in contexts for after in ("x", " self", "\n        return", "y", "<s>", "é")]
    pairs += [("", text[:50]), (text[900:1400], text[1400:1440])]
    got, want = (lm.loglikelihood(of("loglikelihood", pairs)) for lm in (ours, peer))
    # What it takes for the comparison to mean something.
    assert len({round(value, 2) for value, _ in want}) > 40
    for pair, (value, greedy), (peer_value, peer_greedy) in zip(pairs, got, want, strict=True):
        assert value == pytest.approx(peer_value, abs=1e-4, rel=1e-6), pair
        assert greedy == peer_greedy, pair

    blank = [ours.loglikelihood(of("loglikelihood", [pair]))[0][0] for pair in ((" ", "x"), ("", " x"))]
    assert blank[0] == pytest.approx(blank[1], abs=1e-5)  # the peer refuses the first of these

    texts = [(text[:size],) for size in (1, 5, 150, 333, 2000)] + [("",), *((special,) for special in SPECIAL)]
    rolled, peer_rolled = (lm.loglikelihood_rolling(of("loglikelihood_rolling", texts)) for lm in (ours, peer))
    assert rolled == pytest.approx(peer_rolled, abs=1e-4, rel=1e-6)

    prompts = [before for before in contexts if before]
    kinds: list[dict[str, Any]] = [
        {"until": ["\n"], "max_gen_toks": 20},
        {"until": "e", "max_gen_toks": 9, "do_sample": False, "temperature": 0.7},
        {"until": ["self", ")\n", "a"], "max_new_tokens": 40},
        {"until": [], "max_gen_toks": 30, "temperature": 0.0, "num_beams": 1},
        {"max_gen_toks": 1},
    ]
    asked = of("generate_until", [(prompt, dict(kind)) for kind in kinds for prompt in prompts])
    written, peer_written = (lm.generate_until(asked) for lm in (ours, peer))
    assert written == peer_written
    assert len(set(written)) > 12
    draw = torch.Generator().manual_seed(4)
    for size in (1, 3, 9, 40, 40, 40):
        # Half of them bytes of the sentencepiece model, of which few are UTF-8.
        ids = torch.randint(0, 300 if size < 40 else ours._ids.vocab_size, (size,), generator=draw).tolist()
        assert ours._decoder.decode(ids) == peer.tok_decode(ids)


def test_greedy_answers_are_found(trained: RunDir) -> None:
    """What the model itself would write is marked as such, with and without neighbours in the batch."""
    loaded = load_run(trained.path, device="cpu")
    ours = RunLM(loaded, batch_size=3, progress=False)
    prompts = [loaded.tokenizer.encode(line) for line in code().splitlines() if len(line) > 20][:20]
    written = generate(loaded.model, None, prompts, max_new_tokens=6)
    others = [[*ids[:-1], (ids[-1] + 1) % loaded.tokenizer.vocab_size] for ids in written]
    asked = [(None, prompt, ids) for ids_of in (written, others) for prompt, ids in zip(prompts, ids_of, strict=True)]
    found = ours._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in found] == [True] * 20 + [False] * 20
    assert all(first > second for (first, _), (second, _) in zip(found[:20], found[20:], strict=True))


def test_figures_are_those_of_lm_eval(trained: RunDir, tasks: Path, tmp_path: Path) -> None:
    """Tasks from files end to end: examples shown, filters, metrics and error bars."""
    ours = evaluated(trained, tasks, num_fewshot=2, batch_size=7)
    theirs = simple_evaluate(
        model=peer_of(trained, tmp_path / "hf", batch_size=4),
        tasks=list(TASKS),
        num_fewshot=2,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=False,
    )
    assert ours["results"].keys() == theirs["results"].keys() == set(TASKS)
    for task, metrics in {
        "choice": ("acc", "acc_norm"), "last_word": ("acc", "perplexity"), "write": ("exact_match",),
        "write_long": ("exact_match",),
    }.items():  # fmt: skip
        assert values(ours, task, metrics) == pytest.approx(values(theirs, task, metrics), rel=1e-4), task
    for metric in ("word_perplexity,none", "bits_per_byte,none"):
        assert ours["results"]["text"][metric] == pytest.approx(theirs["results"]["text"][metric], rel=1e-5)
    assert 0 < ours["results"]["choice"]["acc,none"] < 1
    for key in ("versions", "n-shot", "n-samples", "higher_is_better"):
        assert ours[key] == theirs[key]
    assert ours["versions"]["choice"] == 2.5 and ours["n-shot"]["choice"] == 2
    assert ours["config"]["step"] == 3 and ours["run_config"]["data"]["sequence_length"] == 64
    assert ours["configs"]["write"]["generation_kwargs"]["max_gen_toks"] == 12


def test_two_processes_and_other_batches_give_the_same(
    trained: RunDir, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["-m", "megafish", "eval", str(trained.path), "--tasks", ",".join(TASKS), "--task-files", str(tasks)]
    command += ["--device", "cpu", "--batch-size", "4", "--limit"]
    pair = start(tmp_path, 2, *command, "9", "--output", "two.json")
    printed = finish(start(tmp_path, 1, *command, "9", "--output", "one.json"))
    finish(pair)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["results"] == two["results"] and one["n-samples"]["choice"] == {"original": CHOICES, "effective": 9}
    assert (one["config"]["processes"], two["config"]["processes"]) == (1, 2)
    assert "|choice" in printed and "±" in printed and "first 9 documents" in printed
    assert printed.splitlines()[-1] == f"next: megafish audit {trained.path}"
    # Fewer documents than processes: one of them has nothing to do.
    finish(start(tmp_path, 2, *command, "1", "--output", "few.json"))
    other = evaluated(trained, tasks, limit=9, batch_size=64)
    for task in TASKS:
        for name, value in one["results"][task].items():
            if isinstance(value, str):  # also "N/A"
                assert other["results"][task][name] == value
                continue
            assert other["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)


def test_sampled_continuations_depend_on_the_request_alone(trained: RunDir) -> None:
    loaded = load_run(trained.path, device="cpu")
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    asked = of("generate_until", [("import ", options)] * 8 + [("def ", {"max_gen_toks": 3})])
    first, second = (RunLM(loaded, batch_size=size, progress=False).generate_until(asked) for size in (8, 3))
    assert first == second and len(set(first[:8])) > 3


def test_length_of_a_stretched_model(trained: RunDir) -> None:
    values = trained.load_config().model_dump()
    values["model"]["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position": 64}
    assert max_length(Config.model_validate(values)) == 256


def test_a_mean_is_what_its_requests_say(trained: RunDir, tasks: Path) -> None:
    """The file's perplexity from the model's plain losses, without lm-eval."""
    texts = [json.loads(line)["text"] for line in (tasks / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    loaded = load_run(trained.path, device="cpu")
    nats, size = 0.0, 0
    for text in texts:
        ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]
        for begin in range(0, len(ids) - 1, 64):
            end = min(begin + 64, len(ids) - 1)
            read = max(0, end - 64)
            with torch.no_grad():
                losses = loaded.model(
                    torch.tensor([ids[read:end]]), targets=torch.tensor([ids[read + 1 : end + 1]]), per_token=True
                )
            nats += float(losses[0, begin - read :].sum())
        size += len(text.encode())
    found = evaluate_run(trained.path, ["text"], task_files=tasks, device="cpu", progress=False)
    assert found is not None
    assert found.results["results"]["text"]["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-5)


Change = Callable[[Path], None]


def _add(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text) and None


BAD: dict[str, tuple[str, Change, dict[str, Any], tuple[str, ...]]] = {
    "unknown": (
        "choise",
        _add("new.yaml", "task: [new\n"),
        {},
        ("no task 'choise'", "choice", "new.yaml", "cannot be read"),
    ),
    "none": (" , ", lambda _: None, {}, ("no task",)),
    "no folder": ("choice", lambda _: None, {"task_files": Path("nowhere")}, ("nowhere",)),
    "no step": ("choice", lambda _: None, {"step": 4}, ("no checkpoint of step 4", "[3]")),
    "no kind": ("new", _add("new.yaml", "include: write.yaml\ntask: new\noutput_type: guess\n"), {}, ("task new",)),
    "no data": (
        "new",
        _add("new.yaml", 'include: choice.yaml\ntask: new\ndataset_kwargs: {data_files: {test: "none.jsonl"}}\n'),
        {},
        ("task new", "none.jsonl"),
    ),
    "no field": (
        "new",
        _add("new.yaml", 'include: choice.yaml\ntask: new\ndoc_to_text: "{{befor.x}}"\n'),
        {},
        ("task new", "befor"),
    ),
    "too long": (
        "new",
        _add("new.yaml", "include: write.yaml\ntask: new\ngeneration_kwargs: {until: [a], max_gen_toks: 64}\n"),
        {},
        ("task new", "64 tokens"),
    ),
    "beams": (
        "new",
        _add("new.yaml", "include: write.yaml\ntask: new\ngeneration_kwargs: {num_beams: 10, max_gen_toks: 4}\n"),
        {},
        ("task new", "num_beams=10"),
    ),
    "output there": ("choice", lambda _: None, {"output": Path(__file__)}, (Path(__file__).name, "overwritten")),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_said_in_one_line(name: str, trained: RunDir, tmp_path: Path) -> None:
    task, change, options, words = BAD[name]
    folder = write_tasks(tmp_path / "tasks")
    change(folder)
    with pytest.raises(InputError) as caught:
        evaluate_run(
            trained.path, task.split(","), **{"task_files": folder, "device": "cpu", "progress": False, **options}
        )
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_command_line(
    trained: RunDir, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megafish", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    before = set(trained.path.rglob("*.json"))
    code, out, err = call(trained.path, "--tasks", tasks / "choice.yaml", "--limit", 3)
    (made,) = set(trained.path.rglob("*.json")) - before
    assert code == 0 and made.parent == trained.path / "evals" and str(made) in out, err
    assert made.name.startswith("step_00000003_")
    assert "Example" in call("--help")[1]
    for arguments, word in (
        ((tmp_path / "none", "--tasks", "choice"), "not a run directory"),
        ((trained.path, "--tasks", ",", "--task-files", tasks), "no task"),
    ):
        code, _, err = call(*arguments)
        assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: ") and word in err
    empty = RunDir(tmp_path / "empty")
    empty.save_config(trained.load_config())
    code, _, err = call(empty.path, "--tasks", "choice", "--task-files", tasks)
    assert code == 2 and err.count("\n") == 1 and "no checkpoint yet" in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call(trained.path, "--tasks", "choice")
    assert code == 2 and err.count("\n") == 1 and "pip install" in err
