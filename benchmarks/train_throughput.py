"""Training throughput and memory on the CPU: megafish beside transformers' LlamaForCausalLM and litgpt's GPT.

Every implementation gets the same weights, the same random tokens, the same torch.optim.AdamW and the same dtype, and
trains in a process of its own, in turn with the others; the median step counts. The first loss of all must agree, so
that the same computation is compared. litgpt pins an older huggingface-hub than transformers does: install it in an
environment of its own and name that one's interpreter with --litgpt-python.

megafish runs with the allocator's settings that its trainer makes on a CPU (megafish/train/host.py), the peers with
the system's. To give them to the peers as well, set them from outside:

    MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=2147483647 python benchmarks/train_throughput.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch

SHAPES: dict[str, dict[str, int]] = {
    "10M-8k": {"layers": 8, "width": 256, "heads": 4, "inner": 704, "vocab": 8192, "batch": 8, "length": 256},
    "25M-8k": {"layers": 12, "width": 384, "heads": 6, "inner": 1024, "vocab": 8192, "batch": 4, "length": 512},
    "25M-32k": {"layers": 10, "width": 256, "heads": 4, "inner": 704, "vocab": 32000, "batch": 4, "length": 512},
    "50M-8k": {"layers": 12, "width": 512, "heads": 8, "inner": 1408, "vocab": 8192, "batch": 4, "length": 512},
    "50M-32k": {"layers": 6, "width": 512, "heads": 8, "inner": 1408, "vocab": 32000, "batch": 4, "length": 512},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
GOLDFISH = {"k": 4, "h": 13}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
NAMES = ("megafish", "megafish goldfish k=4", "transformers", "litgpt")
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def model_config(shape: dict[str, int]) -> Any:
    """The shape as megafish's configuration."""
    from megafish.config import ModelConfig

    return ModelConfig(
        num_layers=shape["layers"],
        hidden_size=shape["width"],
        num_heads=shape["heads"],
        intermediate_size=shape["inner"],
        vocab_size=shape["vocab"],
    )


def build(name: str, shape: dict[str, int], weights: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, Loss]:
    """The model with the given weights, and its loss(tokens, targets)."""
    from safetensors.torch import load_file

    state = load_file(weights)
    if name.startswith("megafish"):
        from megafish.model.transformer import Transformer
        from megafish_kernels import goldfish_drop

        ours = Transformer(model_config(shape), shape["vocab"])
        ours.load_state_dict(state)
        masked = "goldfish" in name

        def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            # The mask is made here, inside the step: no loader's thread hides its cost.
            drop = goldfish_drop(tokens, **GOLDFISH).roll(-1, 1) if masked else None
            return ours(tokens, targets=targets, drop=drop).loss

        return ours.to(dtype), loss
    if name == "transformers":
        peer = transformers_model(shape, state)
        # Its own loss, which shifts the labels itself.
        return peer.to(dtype), lambda tokens, targets: peer(input_ids=tokens, labels=tokens).loss
    gpt = litgpt_model(shape, state)
    from litgpt.utils import chunked_cross_entropy

    # As litgpt's own pretraining does it.
    return gpt.to(dtype), lambda tokens, targets: chunked_cross_entropy(gpt(tokens), targets, chunk_size=0)


def transformers_model(shape: dict[str, int], state: dict[str, torch.Tensor]) -> Any:
    """LlamaForCausalLM with SDPA attention, holding our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=shape["length"],
        rms_norm_eps=1e-5,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    theirs = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for layer in range(shape["layers"]):
        a, b = f"blocks.{layer}", f"model.layers.{layer}"
        theirs[f"{b}.input_layernorm.weight"] = state[f"{a}.attention_norm.weight"]
        theirs[f"{b}.post_attention_layernorm.weight"] = state[f"{a}.feed_forward_norm.weight"]
        for kind, part in zip("qkv", state[f"{a}.attention.qkv.weight"].chunk(3), strict=True):
            theirs[f"{b}.self_attn.{kind}_proj.weight"] = part
        theirs[f"{b}.self_attn.o_proj.weight"] = state[f"{a}.attention.out.weight"]
        for kind, part in zip(("gate", "up"), state[f"{a}.feed_forward.gate_up.weight"].chunk(2), strict=True):
            theirs[f"{b}.mlp.{kind}_proj.weight"] = part
        theirs[f"{b}.mlp.down_proj.weight"] = state[f"{a}.feed_forward.down.weight"]
    model.load_state_dict(theirs)
    return model


def litgpt_model(shape: dict[str, int], state: dict[str, torch.Tensor]) -> Any:
    """litgpt's GPT in its Llama form, holding our weights."""
    from litgpt.model import GPT, Config

    config = Config(
        block_size=shape["length"],
        n_layer=shape["layers"],
        n_embd=shape["width"],
        n_head=shape["heads"],
        vocab_size=shape["vocab"],
        padded_vocab_size=shape["vocab"],
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape["inner"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    model = GPT(config)
    theirs = {
        "transformer.wte.weight": state["embedding.weight"],
        "transformer.ln_f.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for layer in range(shape["layers"]):
        a, b = f"blocks.{layer}", f"transformer.h.{layer}"
        theirs[f"{b}.norm_1.weight"] = state[f"{a}.attention_norm.weight"]
        theirs[f"{b}.norm_2.weight"] = state[f"{a}.feed_forward_norm.weight"]
        theirs[f"{b}.attn.qkv.weight"] = state[f"{a}.attention.qkv.weight"]
        theirs[f"{b}.attn.proj.weight"] = state[f"{a}.attention.out.weight"]
        gate, up = state[f"{a}.feed_forward.gate_up.weight"].chunk(2)
        theirs[f"{b}.mlp.fc_1.weight"], theirs[f"{b}.mlp.fc_2.weight"] = gate, up
        theirs[f"{b}.mlp.proj.weight"] = state[f"{a}.feed_forward.down.weight"]
    model.load_state_dict(theirs)
    return model


def engine_stepper(shape: dict[str, int], weights: Path, precision: str, masked: bool) -> Loss:
    """One whole step through megafish's own trainer engine (DeepSpeed, ZeRO 1); returns the loss."""
    from megafish.config import Config
    from megafish.model.load import load_weights
    from megafish.model.transformer import Transformer
    from megafish.train.engine import Engine, building, start_processes
    from megafish_kernels import goldfish_drop

    config = Config.model_validate(
        {
            "name": "benchmark",
            "model": model_config(shape).model_dump(),
            "data": {"sequence_length": shape["length"]},
            "optimizer": {"grad_clip": None},
            "train": {
                "steps": 1,
                "global_batch_size": shape["batch"],
                "micro_batch_size": shape["batch"],
                "precision": precision,
            },
        }
    )
    processes = start_processes("cpu")
    with building(config, processes):
        model = Transformer(config.model, shape["vocab"])
    load_weights(model, weights.parent)
    engine = Engine(config, model, processes)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        drop = goldfish_drop(tokens, **GOLDFISH).roll(-1, 1) if masked else None
        loss = engine(tokens, targets=targets, drop=drop).loss
        engine.backward(loss, is_last=True)
        engine.step(3e-4)
        return loss.detach()

    return step


def batches(shape: dict[str, int], count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random tokens and their targets; the last token of a row has none."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        tokens = torch.randint(0, shape["vocab"], (shape["batch"], shape["length"]), generator=generator)
        targets = tokens.roll(-1, 1)
        targets[:, -1] = -100
        found.append((tokens, targets))
    return found


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train one implementation for some steps; called in a process of its own."""
    torch.set_num_threads(job["threads"])
    shape, name, weights = job["shape"], job["name"], Path(job["weights"])
    stream = batches(shape, job["warmup"] + job["steps"])
    if job["check"]:
        # litgpt adds up and returns its loss in bf16, 0.06 apart near 9: its logits are compared by an fp32 loss.
        model, _ = build(name, shape, weights, DTYPES[job["dtype"]])
        with torch.no_grad():
            logits = model(stream[0][0]).float()
        return {"loss": float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream[0][1].flatten()))}
    if job["engine"] and name.startswith("megafish"):
        step = engine_stepper(shape, weights, job["dtype"], "goldfish" in name)
    else:
        if name.startswith("megafish"):
            from megafish.train.host import keep_freed_memory

            keep_freed_memory()  # as its trainer does on a CPU
        model, loss_of = build(name, shape, weights, DTYPES[job["dtype"]])
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

        def step(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            loss = loss_of(tokens, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

    base = common.reset_peak_rss()
    seconds, processor, losses = [], [], []
    for tokens, targets in stream:
        begin, used = time.perf_counter(), time.process_time()
        losses.append(float(step(tokens, targets)))
        seconds.append(time.perf_counter() - begin)
        processor.append(time.process_time() - used)
    peak = common.peak_rss()
    if job["profile"]:
        with torch.profiler.profile() as profile:
            step(*stream[0])
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)
    return {
        "loss": losses[0],
        "seconds": seconds[job["warmup"] :],
        "processor": processor[job["warmup"] :],
        "peak": peak,
        "base": base,
    }


def start(job: dict[str, Any], python: str) -> dict[str, Any]:
    """`work` in a fresh interpreter."""
    env = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    done = subprocess.run(
        [python, __file__, "--worker", json.dumps(job)], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(shape_name: str, dtype: str, options: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one shape and dtype."""
    from megafish.model.flops import parameter_count
    from megafish.model.load import save_weights
    from megafish.model.transformer import Transformer

    shape = SHAPES[shape_name]
    names = [name for name in NAMES if name != "litgpt" or options.litgpt_python]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        weights = save_weights(Transformer(model_config(shape), shape["vocab"], seed=0), folder)
        for _ in range(options.repeats):
            for name in names:
                job = {
                    "shape": shape,
                    "name": name,
                    "weights": str(weights),
                    "dtype": dtype,
                    "threads": options.threads,
                }
                job |= {
                    "warmup": options.warmup,
                    "steps": options.steps,
                    "profile": options.profile,
                    "engine": options.engine,
                    "check": False,
                }
                result = start(job, options.litgpt_python if name == "litgpt" else sys.executable)
                results[name].append(result)
                rate = shape["batch"] * shape["length"] / statistics.median(result["seconds"])
                print(f"{shape_name} {dtype} {name}: {rate:.0f} tokens/s", file=sys.stderr, flush=True)
        first = {name: found[0]["loss"] for name, found in results.items() if "goldfish" not in name}
        if "litgpt" in first:
            first["litgpt"] = start(job | {"name": "litgpt", "check": True}, options.litgpt_python)["loss"]
    for name, loss in first.items():
        if abs(loss - first["megafish"]) > LOSS_TOLERANCE[dtype] * first["megafish"]:
            raise SystemExit(f"{shape_name} {dtype}: first loss {loss} of {name}, {first['megafish']} of megafish")

    tokens = shape["batch"] * shape["length"]

    def rate_of(name: str, clock: str) -> float:
        return tokens / statistics.median(value for found in results[name] for value in found[clock])

    peers = [name for name in names if not name.startswith("megafish")]
    best = {clock: max(rate_of(name, clock) for name in peers) for clock in ("seconds", "processor")}
    millions = parameter_count(model_config(shape), shape["vocab"]) / 1e6
    rows = []
    for name in names:
        peak = statistics.median(found["peak"] for found in results[name]) / 2**20
        growth = statistics.median(found["peak"] - found["base"] for found in results[name]) / 2**20
        rows.append(
            [
                f"{shape_name} ({millions:.1f} M, {shape['batch']} x {shape['length']}), {dtype}: {name}",
                f"{rate_of(name, 'seconds'):.0f}",
                f"{rate_of(name, 'seconds') / best['seconds']:.2f}",
                f"{rate_of(name, 'processor') / best['processor']:.2f}",
                f"{peak:.0f}",
                f"{growth:.0f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="model shapes")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="of the weights")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each implementation, taken in turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps of a process that are not timed")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of torch")
    parser.add_argument("--litgpt-python", help="interpreter of an environment with litgpt; left out: no litgpt")
    parser.add_argument("--engine", action="store_true", help="run megafish through its trainer's engine (DeepSpeed)")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE_train_throughput.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        result = work(json.loads(options.worker))
        print(json.dumps(result))
        return
    rows = [row for name in options.shapes for dtype in options.dtypes for row in compare(name, dtype, options)]
    through = "DeepSpeed through megafish's engine (ZeRO 1)" if options.engine else "a plain loop, as the peers"
    text = "\n\n".join(
        [
            f"Forward, backward and fused AdamW on random tokens, {options.threads} threads; megafish in {through}. "
            f"Median step of {options.repeats} processes of {options.steps} steps each, taken in turn. Ratios are to "
            "the faster peer, by wall time and by processor time of all threads (which other load disturbs less). Peak "
            "is the resident memory of the whole process, growth what training added to the loaded model.",
            common.table(rows, ["shape", "tokens/s", "ratio", "ratio (CPU)", "peak [MiB]", "growth [MiB]"]),
        ]
    )
    print(text)
    if options.save:
        print(f"\nsaved {common.save('train_throughput', text)}")


if __name__ == "__main__":
    main()
