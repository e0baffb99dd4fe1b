"""megafish_kernels in other people's trainers: the head as a module, the README's loops, DDP, FSDP2 and ZeRO-3."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megafish_kernels import LinearCrossEntropyHead, linear_cross_entropy
from tests.helpers import finish, start
from tests.kernels.trainers import CASES, VOCAB, WIDTH, Model, global_batch, gradients, reference


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Equal up to a part of the norm."""
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm())


def tiny_llama(tied: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


# ------------------------------------------------------------------------------------------------------ the module


@pytest.mark.parametrize("bias", [True, False])
def test_head_takes_the_place_of_a_linear(bias: bool) -> None:
    linear = nn.Linear(WIDTH, VOCAB, bias=bias).eval()
    before = torch.random.get_rng_state()
    head = LinearCrossEntropyHead.from_linear(linear)
    assert torch.equal(torch.random.get_rng_state(), before), "random numbers were drawn"
    assert head.weight is linear.weight and head.bias is linear.bias and not head.training
    assert isinstance(head, nn.Linear) and (head.in_features, head.out_features) == (WIDTH, VOCAB)
    linear.load_state_dict(head.state_dict())
    head.load_state_dict(linear.state_dict())
    hidden, targets = torch.randn(2, 5, WIDTH), torch.randint(0, VOCAB, (2, 5))
    assert torch.equal(head(hidden), linear(hidden))
    loss, stats = head(hidden, targets, z_loss=0.1, return_stats=True)
    wanted, same = linear_cross_entropy(hidden, linear.weight, targets, bias=linear.bias, z_loss=0.1, return_stats=True)
    assert loss.equal(wanted) and stats.lse.equal(same.lse)


def test_mistakes_of_the_head_are_named() -> None:
    with pytest.raises(ValueError, match=r"linear: expected an nn\.Linear, got Embedding"):
        LinearCrossEntropyHead.from_linear(nn.Embedding(3, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="z_loss: nothing for logits"):
        LinearCrossEntropyHead(2, 3)(torch.zeros(1, 2), z_loss=0.1)


def test_a_llama_keeps_its_tied_weight_and_generates_as_before() -> None:
    model = tiny_llama(tied=True)
    prompt = torch.tensor([[1, 2, 3]])
    before = model.generate(prompt, max_new_tokens=5, do_sample=False)
    names = list(model.state_dict())
    model.lm_head = LinearCrossEntropyHead.from_linear(model.lm_head)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight and list(model.state_dict()) == names
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head_in_a_checkpoint(reduction: str, reentrant: bool) -> None:
    model, batch = Model(), global_batch()
    hidden = model.body(model.embedding(batch.tokens))
    kept = {} if reduction == "none" else {"denominator": batch.kept}

    def head(hidden: Tensor, targets: Tensor) -> Tensor:
        return model.head(hidden, targets, reduction=reduction, **kept)

    loss = checkpoint(head, hidden, batch.targets, use_reentrant=reentrant)
    loss = loss.sum() / batch.kept if reduction == "none" else loss
    loss.backward()
    wanted = reference()
    close(loss.detach(), wanted["loss"])
    for name, gradient in gradients(model).items():
        close(gradient, wanted["gradients"][name])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_leaves_fp32_gradients_to_fp32_weights(reduction: str) -> None:
    model, batch = Model(), global_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch.tokens, batch.targets, reduction=reduction)
    assert loss.dtype == torch.float32
    (loss if reduction == "mean" else loss.sum() / batch.kept).backward()
    wanted = reference()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        close(gradient, wanted["gradients"][name], torch.finfo(torch.bfloat16).eps)


def test_micro_batches_with_uneven_counts_leave_the_gradients_of_the_whole() -> None:
    model, batch = Model(), global_batch()
    counts = [int(batch.rows(row, row + 1).kept) for row in range(len(batch.tokens))]
    assert len(set(counts)) == len(counts), "the counts are to differ"
    total = torch.zeros(())
    for first, last in ((0, 1), (1, 2), (2, 4)):
        part = batch.rows(first, last)
        loss = model(part.tokens, part.targets, denominator=batch.kept)
        loss.backward()
        total += loss.detach()
    wanted = reference()
    close(total, wanted["loss"])
    for name, gradient in gradients(model).items():
        close(gradient, wanted["gradients"][name])


# ------------------------------------------------------------------------------------------------ the README's loops


def readme_loops() -> dict[str, str]:
    """The Python blocks of the section that train, by the model that they train."""
    text = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## In a trainer of your own\n")[1].split("\n## ")[0]
    plain, llama = (block for block in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S) if "for " in block)
    return {"plain": plain, "llama": llama}


def run_loop(code: str, steps: int = 15) -> tuple[list[float], Tensor, dict[str, Any]]:
    """Losses of a loop that learns one batch by heart; the batch; the loop's names, weights as after the last step."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 64, (4, 24))
    names: dict[str, Any] = {"config": tiny_llama().config} if "config" in code else {}
    losses: list[float] = []

    def batches() -> Iterator[Tensor]:
        for _ in range(steps):
            yield tokens
            losses.append(names["loss"].item())

    names["batches"] = batches()
    exec(code, names)
    return losses, tokens, names


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_loops_of_the_readme_train(name: str) -> None:
    losses, _, names = run_loop(readme_loops()[name])
    share = float(names["drop"].float().mean())
    assert 0.02 < share < 0.4, "goldfish_drop leaves out some tokens"
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_loops_of_the_readme_give_the_usual_loss_when_nothing_is_dropped(name: str) -> None:
    code = readme_loops()[name]
    assert "k=4" in code
    # The loss is that before the only step, which a learning rate of 0 leaves without effect.
    (loss,), tokens, names = run_loop(re.sub(r"lr=[\w-]+", "lr=0.0", code.replace("k=4", "k=None")), steps=1)
    with torch.no_grad():
        if name == "llama":
            wanted = names["model"](tokens, labels=tokens).loss
        else:
            logits = names["head"](names["body"](tokens[:, :-1]))
            wanted = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss == pytest.approx(float(wanted), rel=1e-6)


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of every case of trainers.py on two processes."""
    folder = tmp_path_factory.mktemp("trainers")
    finish(start(folder, 2, str(Path(__file__).with_name("trainers.py")), "outcome.pt"))
    return torch.load(folder / "outcome.pt")


@pytest.mark.parametrize("case", [case for case in CASES if "from outside" not in case])
def test_two_processes_equal_one(two_processes: dict[str, dict[str, Any]], case: str) -> None:
    outcome = two_processes[case]
    assert "failed" not in outcome, outcome["failed"]
    wanted = reference(tied="tied" in case, idle="without kept" in case)
    tolerance = torch.finfo(torch.bfloat16).eps if "bf16" in case else 1e-6
    close(outcome["loss"], wanted["loss"], tolerance)
    assert outcome["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in outcome["gradients"].items():
        assert gradient.dtype == torch.float32
        close(gradient, wanted["gradients"][name], tolerance)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("fsdp, from outside", "weight: is a DTensor"),
        ("zero3, from outside", r"weight: expected \[V, D\], got shape \(0,\)"),
    ],
)
def test_a_weight_that_is_not_gathered_is_named(
    two_processes: dict[str, dict[str, Any]], case: str, words: str
) -> None:
    outcome = two_processes[case]
    assert "failed" not in outcome, outcome["failed"]
    assert re.match(words, outcome["error"]), outcome["error"]
    assert "forward of the module that owns it: call this there" in outcome["error"]
