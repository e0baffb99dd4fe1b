"""Training steps on one GPU: megafish, plain and goldfish, beside transformers' LlamaForCausalLM and Liger's kernels.

    python benchmarks/train_gpu.py                          both shapes
    python benchmarks/train_gpu.py --shapes 1b --steps 30 --save

Needs a CUDA device. Every model goes through the same engine (DeepSpeed, ZeRO 1, bf16 with fp32 master weights, torch's
fused AdamW, gradient clipping) on the same random tokens, one after the other in one process; only the model and its
loss differ. The peers have scaled_dot_product_attention; "Liger" is transformers with Liger's norm, rotary, SwiGLU and
fused head patched in. Times are of whole steps, the host's waits included. Model FLOPs count what the step needs
(megafish.model.flops): with goldfish the head of kept tokens alone.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from common import machine, save, table
from torch import Tensor, nn

from megafish.config import Config
from megafish.model.flops import device_peak_flops, flops_per_token, parameter_count
from megafish.model.transformer import Transformer
from megafish.train.engine import Engine, Processes, building, start_processes
from megafish_kernels import goldfish_drop

SHAPES: dict[str, dict[str, Any]] = {
    "125m": {
        "model": {
            "num_layers": 12,
            "hidden_size": 768,
            "num_heads": 12,
            "intermediate_size": 2048,
            "vocab_size": 50304,
            "tie_embeddings": True,
        },
        "batch": 16,
    },
    "1b": {
        "model": {
            "num_layers": 22,
            "hidden_size": 2048,
            "num_heads": 32,
            "num_kv_heads": 4,
            "intermediate_size": 5632,
            "vocab_size": 32000,
        },
        "batch": 8,
    },
}
"""The presets of these names, and their micro-batch."""
LENGTH = 2048
GOLDFISH = {"k": 4, "h": 13}
Step = Callable[[Tensor, Tensor], Tensor]


class Peer(nn.Module):
    """A transformers model called as ours is."""

    def __init__(self, config: Config):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = config.model
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_heads,
                num_key_value_heads=shape.resolved_kv_heads,
                max_position_embeddings=LENGTH,
                tie_word_embeddings=shape.tie_embeddings,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )

    @property
    def embedding(self) -> nn.Module:
        """By which the optimizer knows what not to decay."""
        return self.model.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, tokens: Tensor, targets: Tensor, drop: None) -> Any:
        # Labels that are shifted already, so that none has to be made.
        return SimpleNamespace(loss=self.model(input_ids=tokens, labels=targets, shift_labels=targets).loss)


def stepper(name: str, config: Config, processes: Processes) -> tuple[Engine, Step]:
    """An engine, and one whole step of it."""
    if name == "Liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()  # of all models made from now on: it comes last
    with building(config, processes):
        ours = name.startswith("megafish")
        vocab = config.model.vocab_size
        assert vocab is not None
        model: Any = Transformer(config.model, vocab) if ours else Peer(config)
    if ours:
        model.tie()
    else:
        model.to(processes.device)  # what is no parameter
    engine = Engine(config, model, processes)
    masked = "goldfish" in name

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        drop = goldfish_drop(tokens, **GOLDFISH).roll(-1, 1) if masked else None
        loss = engine(tokens, targets=targets, drop=drop).loss
        engine.backward(loss, is_last=True)
        engine.step(3e-4)
        return loss.detach()

    return engine, step


def measure(
    name: str, config: Config, processes: Processes, batch: int, options: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of a step, MiB at the peak, and the first loss."""
    device = processes.device
    engine, step = stepper(name, config, processes)
    g = torch.Generator(device).manual_seed(0)
    assert config.model.vocab_size is not None
    seconds, losses = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(options.warmup + options.steps):
        tokens = torch.randint(0, config.model.vocab_size, (batch, options.length), generator=g, device=device)
        targets = tokens.roll(-1, 1)
        targets[:, -1] = -100
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        losses.append(step(tokens, targets))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    if options.profile:
        with torch.profiler.profile() as profile:
            step(tokens, targets)
        sort = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        averages = profile.key_averages()
        print(averages.table(sort_by=sort, row_limit=30, max_name_column_width=60), file=sys.stderr, flush=True)
    engine.engine.destroy()
    return {"seconds": statistics.median(seconds[options.warmup :]), "peak": peak, "loss": float(losses[0])}


def rows_of(shape_name: str, processes: Processes, options: argparse.Namespace) -> list[list[str]]:
    shape = SHAPES[shape_name]
    batch = options.batch or shape["batch"]
    config = Config.model_validate(
        {
            "name": "benchmark",
            "model": shape["model"],
            "data": {"sequence_length": options.length},
            "train": {"steps": 1, "global_batch_size": batch, "micro_batch_size": batch, "precision": "bf16"},
            "engine": {"zero_stage": 1},
        }
    )
    vocab = config.model.vocab_size
    assert vocab is not None
    names = ["megafish", "megafish goldfish k=4", "transformers", "Liger"]
    needed = {"transformers": "transformers", "Liger": "liger_kernel"}
    names = [name for name in names if name not in needed or find_spec(needed[name])]
    if processes.device.type == "cpu" and "Liger" in names:
        names.remove("Liger")  # its kernels are for GPUs alone
    tokens, peak_flops = batch * options.length, device_peak_flops(processes.device)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        found[name] = measure(name, config, processes, batch, options)
        print(f"{shape_name}, {name}: {tokens / found[name]['seconds']:,.0f} tokens/s", file=sys.stderr, flush=True)
        gc.collect()
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
    rows = []
    base = found.get("transformers")
    for name, figures in found.items():
        kept = 0.75 if "goldfish" in name else 1.0
        achieved = flops_per_token(config.model, vocab, options.length, kept) * tokens / figures["seconds"]
        rows.append(
            [
                f"{shape_name} ({parameter_count(config.model, vocab) / 1e6:.0f}M), {batch} x {options.length}: {name}",
                f"{1000 * figures['seconds']:.1f}",
                f"{tokens / figures['seconds']:,.0f}",
                f"{base['seconds'] / figures['seconds']:.2f}" if base else "",
                f"{100 * achieved / peak_flops:.1f}" if peak_flops else "",
                f"{figures['peak']:,.0f}",
                f"{figures['peak'] / base['peak']:.2f}" if base and base["peak"] else "",
                f"{figures['loss']:.3f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="presets")
    parser.add_argument("--batch", type=int, help="sequences of a step (default: the preset's micro-batch)")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, of which the median counts")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--profile", action="store_true", help="print where the time of one more step goes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script out")
    parser.add_argument("--save", action="store_true", help="write results/DATE_train_gpu.md")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("train_gpu: no CUDA device here; --device cpu tries the script out", file=sys.stderr)
        raise SystemExit(2)
    processes = start_processes(options.device)
    rows = [row for name in options.shapes for row in rows_of(name, processes, options)]
    text = (
        f"Whole training steps of one process (DeepSpeed, ZeRO 1, bf16 with fp32 master weights, fused AdamW), random "
        f"tokens. Medians of {options.steps} steps. MFU: operations that the step needs over the device's dense bf16 "
        "peak. Ratios are to transformers: of speed, above 1 is faster; of memory, below 1 is less. Peak: what torch "
        "has allocated, weights, gradients and optimizer included.\n\n"
    )
    columns = ["shape, method", "ms", "tokens/s", "speed ratio", "MFU [%]", "peak [MiB]", "memory ratio", "first loss"]
    text += table(rows, columns)
    print(f"{machine()}\n\n{text}")
    if options.save:
        print(f"saved {save('train_gpu', text)}")


if __name__ == "__main__":
    main()
