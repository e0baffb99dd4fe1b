"""Self-contrastive training against the paper's formula, and the mistakes that must not start a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from megafish.config import Config, ContrastConfig, load_config
from megafish.data.loader import IGNORE, Batch
from megafish.errors import InputError
from megafish.model.load import load_run
from megafish.model.mesh import Mesh
from megafish.objective.contrast import Premature, seen_recently
from megafish.train.loop import train
from tests.helpers import read_metrics

QUIET = Console(quiet=True)


@pytest.fixture
def settings(corpus: Path) -> list[str]:
    return [
        f"data.train={corpus}",
        "model={num_layers: 1, hidden_size: 32, num_heads: 2, intermediate_size: 48, tie_embeddings: true}",
        "data.sequence_length=48",
        "train={precision: fp32, global_batch_size: 4, micro_batch_size: 2, steps: 2}",
        "engine.zero_stage=0",
        "checkpoint.interval=null",
    ]


@pytest.fixture
def premature_run(settings: list[str], tmp_path: Path) -> Path:
    train(load_config("tiny", [*settings, f"run_dir={tmp_path}/first"]), console=QUIET)
    return tmp_path / "first"


def batch_of(vocab: int, rows: int, length: int) -> Batch:
    """Text of few words, so that much of it comes again; documents of 19 tokens."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    starts = torch.arange(0, rows * length, 19)
    starts = torch.cat((starts, torch.arange(0, rows * length, length))).unique()
    targets = text[:, 1:].clone()
    for start in starts.tolist():
        if start % length:
            targets[start // length, start % length - 1] = IGNORE
    drop = (torch.rand(rows, length, generator=generator) < 0.25) & (targets != IGNORE)
    bounds = torch.cat((starts, torch.tensor([rows * length])))
    kept = int((targets != IGNORE).sum() - drop.sum())
    return Batch(
        text[:, :-1], targets, drop, bounds.int(), int(bounds.diff().max()), [*range(rows)], kept, int(drop.sum())
    )


def documents(batch: Batch) -> list[list[int]]:
    """For every input of every row the places of its document's inputs up to it."""
    starts = set(batch.cu_seqlens.tolist())
    rows, length = batch.tokens.shape
    found = []
    for row in range(rows):
        begin = 0
        for place in range(length):
            begin = place if row * length + place in starts else begin
            found.append([*range(begin, place + 1)])
    return found


@pytest.mark.parametrize("context", [1, 3, 64])
def test_a_repetition_is_of_the_last_tokens_of_the_document(context: int) -> None:
    batch = batch_of(12, 3, 48)
    history = documents(batch)
    begins = torch.tensor([places[0] for places in history]).view(3, 48)
    got = seen_recently(batch.targets, batch.tokens, begins, context)
    for index, places in enumerate(history):
        row, place = divmod(index, 48)
        last = batch.tokens[row, places[-context:]].tolist()
        assert bool(got[row, place]) == (int(batch.targets[row, place]) in last)
    assert 0 < int(got.sum()) < got.numel()


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
def test_loss_and_gradient_are_the_papers(
    settings: list[str], premature_run: Path, smoothing: float, z_loss: float
) -> None:
    strength, context = 3.0, 16
    loaded = load_run(premature_run, device="cpu")
    vocab = loaded.tokenizer.vocab_size
    config = ContrastConfig(premature=str(premature_run), strength=strength, context=context)
    cpu = torch.device("cpu")
    premature = Premature(config, loaded.tokenizer, Mesh(), cpu, torch.float32, sharded=False)
    batch = batch_of(30, 3, 48)

    model = load_run(premature_run, device="cpu").model
    model.head.loss = model.head.loss.model_copy(update={"label_smoothing": smoothing, "z_loss": z_loss})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    options = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    contrast = premature(batch)
    out = model(batch.tokens, targets=batch.targets, drop=batch.drop, contrast=contrast, **options)
    out.loss.backward()
    got = {name: parameter.grad.double() for name, parameter in model.named_parameters()}

    # As the paper has it: both logits whole, the weight from the premature model's first choice.
    z0 = loaded.model.double()(batch.tokens, **options)[..., :vocab].double().detach().flatten(0, 1)
    model.zero_grad()
    z1 = model.double()(batch.tokens, **options)[..., :vocab]
    assert z1.dtype == torch.float32, "logits are cast"  # so they are made anew, in float64
    rows = torch.arange(batch.tokens.numel())
    hidden = model.hidden_rows(batch.tokens, rows, **options)
    z1 = (hidden @ model.head.weight[:vocab].T).view(-1, vocab)
    targets = batch.targets.masked_fill(batch.drop, IGNORE).flatten()
    loss = torch.zeros((), dtype=torch.float64)
    corrected = 0
    for index, places in enumerate(documents(batch)):
        target = int(targets[index])
        if target == IGNORE:
            continue
        last = batch.tokens.flatten()[[index - len(places) + 1 + at for at in range(len(places))][-context:]].tolist()
        w = int(z0[index].argmax()) in last and target not in last
        corrected += w
        logits = z1[index] + strength * w * z0[index]
        lse = logits.logsumexp(0)
        smooth = smoothing * (lse - logits.mean())
        loss = loss + (1 - smoothing) * (lse - logits[target]) + smooth + z_loss * lse**2
    assert corrected == int(contrast.mask.sum()) == len(contrast.hidden) and 3 < corrected < batch.kept
    (loss / batch.kept).backward()
    torch.testing.assert_close(out.loss.double(), loss / batch.kept, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (got[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, (name, float(error))


def test_a_second_run_reports_what_it_corrects(settings: list[str], premature_run: Path, tmp_path: Path) -> None:
    second = [*settings, f"run_dir={tmp_path}/second", f"train.initial_weights={premature_run}"]
    config = load_config("tiny", [*second, f"contrast.premature={premature_run}", "goldfish.k=null"])
    outcome = train(config, console=QUIET)
    steps = read_metrics(outcome.run.path)["train"]
    assert all(0 < step["corrected_tokens"] < step["kept_tokens"] for step in steps)
    # The premature model's forward pass is counted: a third of a training step of the same shape.
    plain = read_metrics(premature_run)["train"][0]
    assert steps[0]["flops"] > 1.3 * plain["flops"]


def test_another_premature_model_cannot_continue(settings: list[str], premature_run: Path, tmp_path: Path) -> None:
    config = [*settings, f"run_dir={tmp_path}/second", f"contrast.premature={premature_run}"]
    train(load_config("tiny", config), console=QUIET)
    other = [*settings, "train.seed=1", f"run_dir={tmp_path}/other"]
    train(load_config("tiny", other), console=QUIET)
    changed: Config = load_config("tiny", [*config[:-1], f"contrast.premature={tmp_path}/other", "train.steps=3"])
    with pytest.raises(InputError, match=r"contrast\.premature is not the model"):
        train(changed, resume=True, console=QUIET)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("patch.size=4", "premature model predicts tokens, not patches"),
        ("loss.mile_gamma=1", "not the model's own"),
        ("engine.tensor_parallel=2", "both heads are needed whole"),
    ],
)
def test_what_makes_no_sense_together_is_refused(settings: list[str], override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_config("tiny", [*settings, "contrast.premature=first", override])


def test_options_without_a_model_are_refused(settings: list[str]) -> None:
    with pytest.raises(InputError, match="no meaning with premature=null"):
        load_config("tiny", [*settings, "contrast.strength=2"])


def test_a_premature_model_that_is_not_there(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        train(load_config("tiny", [*settings, f"run_dir={tmp_path}/run", "contrast.premature=nowhere"]), console=QUIET)
