"""Small tasks in files, and runs to evaluate on them."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megafish.data.tokenizer import load_tokenizer
from megafish.model.load import save_weights
from megafish.run import RunDir
from tests.audit.helpers import learned
from tests.huggingface.helpers import random_run

TASKS = ("choice", "last_word", "text", "write", "write_long")
CHOICES, TEXTS = 24, 6

_CHOICE = """
task: choice
output_type: multiple_choice
doc_to_text: "{{before}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
fewshot_delimiter: "\\n"
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 2.5}
"""
_LAST_WORD = """
task: last_word
output_type: loglikelihood
doc_to_text: "{{before}}"
doc_to_target: " {{choices[answer]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
metadata: {version: 1.0}
"""
_TEXT = """
task: text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
"""
_WRITE = """
task: write
output_type: generate_until
doc_to_text: "{{before}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
metadata: {version: 1.0}
"""
_WRITE_LONG = """
include: write.yaml
task: write_long
generation_kwargs: {until: ["def "], max_gen_toks: 40}
"""


def code() -> str:
    """Text of the kind that the corpus of the tests is made of."""
    return (Path(sysconfig.get_paths()["stdlib"]) / "json" / "decoder.py").read_text(encoding="utf-8")


def write_tasks(folder: Path) -> Path:
    """Tasks of every kind of request on pieces of Python: short ones and ones too long for the models."""
    draw = random.Random(3)
    text = code()
    choices: list[dict[str, Any]] = []
    for number in range(CHOICES):
        start, length = draw.randrange(len(text) - 700), draw.choice((3, 20, 90, 400))
        end = start + length
        # Some contexts end in white space, some answers are of one token, some are long.
        answers = [text[end : end + draw.choice((1, 2, 9, 30))]]
        answers += [text[at : at + draw.choice((1, 8))] for at in draw.sample(range(len(text) - 9), 2)]
        answers = [answer.lstrip() or "x" for answer in answers]
        place = draw.randrange(3)
        answers[0], answers[place] = answers[place], answers[0]
        choices.append({"before": text[start:end], "choices": answers, "answer": place})
        if number % 6 == 0:
            choices[-1]["before"] += " \n "
    sizes = (1, 30, 150, 333, 700, 980)
    texts = [{"text": text[1000 * place : 1000 * place + size]} for place, size in enumerate(sizes)]
    texts[1]["text"] = "Grüße, 世界 \u2581 🐟 " + texts[1]["text"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("choices", choices), ("texts", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for content, data in (
        (_CHOICE, "choices"), (_LAST_WORD, "choices"), (_TEXT, "texts"), (_WRITE, "choices"), (_WRITE_LONG, None),
    ):  # fmt: skip
        name = content.partition("task: ")[2].split()[0]
        where = ""
        if data is not None:
            files = json.dumps({"test": str(folder / f"{data}.jsonl")})
            where = f"dataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(content + where, encoding="utf-8")
    return folder


def trained_run(folder: Path, corpus: Path) -> RunDir:
    """A Llama that has learned something of the corpus; it reads 64 tokens."""
    run = random_run(folder, {}, train=str(corpus))
    save_weights(learned(run.load_config()), run.checkpoint(3))
    return run


def bos_run(folder: Path) -> RunDir:
    """A Qwen3 of random weights with a byte-level tokenizer.json that puts a token before every text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[begin, end], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([code()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder / "tokenizer.json").bos_id == 0
    return random_run(folder / "run", {"qk_norm": True}, tokenizer=str(folder / "tokenizer.json"))


def values(results: dict[str, Any], task: str, names: Sequence[str]) -> list[float]:
    """Metrics of a task and their standard errors."""
    found = results["results"][task]
    return [found[f"{name}{end},none"] for name in names for end in ("", "_stderr")]
