"""What the objectives cost: a step of each beside a plain one, in turn, on the same batches of real text.

The corpus is that of benchmarks/patches.py, and so is the shape unless another is asked for. A step is forward,
backward and AdamW; the self-contrastive one has the premature model's forward pass and the search for what it predicts
wrongly.

    python benchmarks/objectives.py [--steps 15] [--shape 8x256] [--save]
    python benchmarks/objectives.py --device cuda --shape 12x768 --rows 8 --length 2048 --save
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import save, table
from patches import SIZE, make_corpus

from megafish.config import ContrastConfig, LossConfig, ModelConfig, load_config
from megafish.data.corpus import SampleStream, open_train, run_tokenizer
from megafish.data.loader import Batch, Loader
from megafish.data.patches import patch_batch
from megafish.model.load import initial_weights
from megafish.model.mesh import Mesh
from megafish.model.transformer import Transformer
from megafish.objective.contrast import Premature
from megafish.objective.goldfish import GoldfishMask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train_premature(folder: Path, corpus: Path, shape: str, asked: argparse.Namespace) -> Path:
    """A run of the shape that has learned which words are frequent, and so repeats them."""
    run = folder / "premature"
    overrides = [
        f"model={shape}",
        f"data={{train: {corpus}, sequence_length: {asked.length}}}",
        f"train={{steps: {asked.premature_steps}, global_batch_size: {asked.rows}, micro_batch_size: {asked.rows}}}",
        f"train.device={asked.device}",
        f"train.precision={asked.precisions[0]}",
        "engine.zero_stage=1",
        "optimizer.lr=1.5e-3",
        "goldfish.k=null",
        "eval={interval: null, sequences: 8}",
        "checkpoint.interval=null",
        f"run_dir={run}",
    ]
    subprocess.run(
        [sys.executable, "-m", "megafish", "train", "tiny", *overrides], check=True, stdout=subprocess.DEVNULL
    )
    return run


def main() -> None:
    """The steps and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="steps of each objective")
    parser.add_argument("--shape", default="8x256", help="layers x width")
    parser.add_argument("--rows", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--premature-steps", type=int, default=150)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--folder", type=Path, help="where the corpus is, or is kept")
    parser.add_argument("--save", action="store_true", help="write results/DATE_objectives.md")
    asked = parser.parse_args()
    layers, width = map(int, asked.shape.split("x"))
    inner = -(-width * 8 // 3 // 64) * 64
    heads = max(1, width // 64)
    shape = f"{{num_layers: {layers}, hidden_size: {width}, num_heads: {heads}, intermediate_size: {inner}, "
    shape += "tie_embeddings: false}"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(asked.folder or folder, 8192)
        run = train_premature(folder, corpus, shape, asked)
        for precision in asked.precisions:
            rows += measure(run, precision, asked)
    head = ["step", "ms", "of plain", "tokens/s of plain", "corrected targets"]
    place = torch.cuda.get_device_name() if asked.device == "cuda" else f"{torch.get_num_threads()} threads"
    text = f"{layers} layers of width {width}, {asked.rows} x {asked.length} tokens a step, {place}; "
    text += f"medians of {asked.steps} steps in turn. Patches of {SIZE} tokens.\n\n{table(rows, head)}"
    print(text)
    if asked.save:
        print(save("objectives", text))


def measure(run: Path, precision: str, asked: argparse.Namespace) -> list[list[str]]:
    """Rows of the table in one precision."""
    dtype, device = DTYPES[precision], torch.device(asked.device)
    config = load_config(run / "config.yaml")
    sources, tokenizer = open_train(config.data), run_tokenizer(config.data)
    stream = SampleStream(sources, asked.length, seed=1, halo=13)
    mask = GoldfishMask(config.goldfish.model_copy(update={"k": 4}), tokenizer)
    plain, masked = (Loader(stream, each, asked.rows, asked.rows) for each in (None, mask))
    premature = Premature(ContrastConfig(premature=str(run)), tokenizer, Mesh(), device, dtype, sharded=False)
    model_config: ModelConfig = config.model
    corrected: dict[str, list[float]] = {}

    def stepper(loss: LossConfig, patch: int | None = None, contrasted: str = "") -> Callable[[Batch], None]:
        weights = initial_weights(run, model_config, tokenizer.vocab_size)
        model = Transformer(model_config, tokenizer.vocab_size, loss=loss, weights=weights).to(device, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

        def step(batch: Batch) -> None:
            batch = batch if patch is None else patch_batch(batch, patch)
            contrast = premature(batch) if contrasted else None
            if contrast is not None:
                corrected.setdefault(contrasted, []).append(len(contrast.hidden) / batch.kept)
            out = model(
                batch.tokens.to(device),
                targets=batch.targets.to(device),
                drop=batch.drop.to(device),
                cu_seqlens=batch.cu_seqlens.to(device),
                max_seqlen=batch.max_seqlen,
                denominator=batch.kept,
                patch=patch,
                contrast=contrast,
            )
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    cases = {
        "plain": (stepper(LossConfig()), plain),
        "goldfish k=4": (stepper(LossConfig()), masked),
        "MiLe": (stepper(LossConfig(mile_gamma=1.0)), plain),
        "self-contrastive": (stepper(LossConfig(), contrasted="self-contrastive"), plain),
        "self-contrastive, goldfish k=4": (stepper(LossConfig(), contrasted="self-contrastive, goldfish k=4"), masked),
        "patches": (stepper(LossConfig(), patch=SIZE), plain),
        "patches, goldfish k=4": (stepper(LossConfig(), patch=SIZE), masked),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(asked.steps + 2):
        for name, (step, loader) in cases.items():
            batch = loader.step(number * asked.rows).micro_batches[0]
            started = time.perf_counter()
            step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    base = statistics.median(times["plain"])
    rows = []
    for name, taken in times.items():
        seconds = statistics.median(taken)
        share = f"{statistics.mean(corrected[name]):.1%}" if name in corrected else ""
        rows.append(
            [f"{name}, {precision}", f"{seconds * 1e3:.4g}", f"{seconds / base:.3f}", f"{base / seconds:.2f}", share]
        )
    return rows


if __name__ == "__main__":
    main()
