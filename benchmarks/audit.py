"""Probes per second of an extraction audit beside transformers' generate: the same model, prompts, batches and dtype.

A Llama of random weights is written by transformers and read by megafish. Both continue the same prompts greedily with
a key/value cache; what they write is compared. "scored" is the answer of one forward pass: whether the true suffix
would come out word for word, as a sweep of prompt lengths asks it. "audit" is what `megafish audit` does: that pass,
then the generation of what it does not tell, from the same cache, with none, half and all of the passages recited (the
suffixes of those are what the model writes). "with scores" is what it takes with transformers to have the same figures:
generate, then a forward pass over the passages for the log-probabilities of the true suffixes. On a
CPU a second table shares the batches among processes, one a core with one thread each, as `torchrun --nproc-per-node 2
--no-python megafish audit RUN` does, and two more put what a step of decoding does beside what torch does otherwise:
the products with the model's matrices, and attention of one token over a cache. The ways take turns; figures are
medians, and ratios are to the probes per second of transformers in one process.

    python benchmarks/audit.py [--probes 128] [--repeats 3] [--save]
    python benchmarks/audit.py --device cuda --shapes 50M 1B --save
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import save, table
from torch.nn.functional import linear, scaled_dot_product_attention

from megafish.audit.continuation import score_and_continue
from megafish.audit.scores import token_scores
from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from megafish.decode.generate import generate
from megafish.decode.packed import PackedLinear, for_decoding
from megafish.demo import library_files
from megafish.huggingface.importer import load_model
from megafish.model.attention import one_token
from megafish.model.transformer import Transformer

VOCAB, PROMPT, SUFFIX = 8192, 50, 50
SHARES = (0.0, 0.5, 1.0)
"""Of the passages, recited."""


class Shape(NamedTuple):
    """Of a Llama."""

    layers: int
    width: int
    heads: int


SHAPES = {"10M": Shape(8, 256, 4), "50M": Shape(12, 512, 8), "1B": Shape(16, 2048, 32)}


def write_model(folder: Path, shape: Shape, dtype: torch.dtype, tokenizer: Path) -> None:
    """A Llama with the tokenizer, as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape.width,
        intermediate_size=shape.width * 11 // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())


def passages(count: int, tokenizer: Tokenizer) -> list[list[int]]:
    """Beginnings of modules of the standard library [PROMPT + SUFFIX]."""
    files = library_files(40_000_000, seed=0)
    texts = (tokenizer.encode(file.read_text(encoding="utf-8", errors="replace")) for file in files)
    found = [list(ids[: PROMPT + SUFFIX]) for ids in texts if len(ids) >= PROMPT + SUFFIX]
    return [found[i % len(found)] for i in range(count)]


@torch.inference_mode()
def theirs(model: Any, texts: list[list[int]], batch: int) -> list[list[int]]:
    """transformers' greedy continuations."""
    outputs: list[list[int]] = []
    for start in range(0, len(texts), batch):
        ids = torch.tensor([text[:PROMPT] for text in texts[start : start + batch]], device=model.device)
        mask = torch.ones_like(ids)
        found = model.generate(
            ids, attention_mask=mask, max_new_tokens=SUFFIX, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        outputs += found[:, PROMPT:].tolist()
    return outputs


@torch.inference_mode()
def their_audit(model: Any, texts: list[list[int]], batch: int) -> list[torch.Tensor]:
    """Besides what `theirs` writes, log-probability of each true token of a suffix, and whether it is the likeliest."""
    theirs(model, texts, batch)
    found = []
    for start in range(0, len(texts), batch):
        ids = torch.tensor(texts[start : start + batch], device=model.device)
        logits = model(ids, use_cache=False, logits_to_keep=SUFFIX + 1).logits[:, :-1].float()
        log_probs = logits.log_softmax(-1).gather(2, ids[:, PROMPT:, None]).squeeze(2)
        found.append(torch.stack((log_probs, logits.argmax(-1) == ids[:, PROMPT:])))
    return found


def measure(ways: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """(median seconds, result) of each way; they take turns, after one unmeasured turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


_model: Any
"""Of a process of `spread`."""


def _load(folder: Path, dtype: torch.dtype, ours: bool) -> None:
    global _model
    torch.set_num_threads(1)
    if ours:
        _model = for_decoding(load_model(folder, "cpu")[0])
    else:
        from transformers import LlamaForCausalLM

        _model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _their_batch(texts: list[list[int]]) -> list[list[int]]:
    return theirs(_model, texts, len(texts))


def _their_audit(texts: list[list[int]]) -> int:
    return len(their_audit(_model, texts, len(texts)))


def _our_batch(texts: list[list[int]]) -> list[list[int]]:
    return generate(_model, None, [text[:PROMPT] for text in texts], max_new_tokens=SUFFIX, batch_size=len(texts))


def _audited_batch(texts: list[list[int]]) -> list[list[int]]:
    return audit(_model, texts, len(texts))


def audit(model: Transformer, texts: list[list[int]], batch: int) -> list[list[int]]:
    """What `megafish audit` does to see how much of each text is recited."""
    prompts, suffixes = [text[:PROMPT] for text in texts], [text[PROMPT:] for text in texts]
    return score_and_continue(model, None, prompts, suffixes, batch_size=batch)[1]


def spread(
    folder: Path, dtype: torch.dtype, texts: dict[float, list[list[int]]], asked: argparse.Namespace, rate: float
) -> list[str]:
    """Probes per second with a process a core, as ratios to `rate`, that of transformers in one process. texts: by the
    share of them that is recited."""
    cores, context = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    pools = {
        ours: ProcessPoolExecutor(cores, mp_context=context, initializer=_load, initargs=(folder, dtype, ours))
        for ours in (False, True)
    }

    def share(work: Callable[[list[list[int]]], Any], ours: bool, share: float = 0.0) -> None:
        batches = [texts[share][start : start + asked.batch] for start in range(0, asked.probes, asked.batch)]
        list(pools[ours].map(work, batches))

    ways: dict[str, Callable[[], Any]] = {"theirs": partial(share, _their_batch, False)}
    ways["with scores"] = partial(share, _their_audit, False)
    ways["ours"] = partial(share, _our_batch, True)
    ways |= {f"audit {part:.0%}": partial(share, _audited_batch, True, part) for part in texts}
    try:
        seconds, _ = measure(ways, asked.repeats)
    finally:
        for pool in pools.values():
            pool.shutdown()
    return [f"{asked.probes / taken / rate:.2f}" for taken in seconds.values()]


@torch.inference_mode()
def products(repeats: int) -> str:
    """32 rows by 8 matrices in turn: a table."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for out, width in ((768, 256), (1408, 256), (8192, 256), (2816, 512), (8192, 512)):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(32, width, generator=generator).to(dtype)
            weights = [torch.randn(out, width, generator=generator).to(dtype) for _ in range(8)]
            layers = [PackedLinear(weight, None) for weight in weights]

            def plain(x: Any = x, weights: Any = weights) -> None:
                for weight in weights:
                    linear(x, weight)

            def packed(x: Any = x, layers: Any = layers) -> None:
                for layer in layers:
                    layer(x)

            seconds, _ = measure({"plain": plain, "packed": packed}, 20 * repeats)
            shape = f"{out} x {width}, {str(dtype).removeprefix('torch.')}"
            speeds = [2e-9 * 8 * 32 * out * width / seconds[way] for way in ("plain", "packed")]
            rows.append([shape, f"{speeds[0]:.0f}", f"{speeds[1]:.0f}", f"{speeds[1] / speeds[0]:.2f}"])
    return table(rows, ["32 rows by a matrix", "F.linear [GFLOP/s]", "laid out for oneDNN", "times as fast"])


@torch.inference_mode()
def attention(repeats: int) -> str:
    """One token over the caches of 8 layers in turn, so that none stays in the processor's: a table."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for heads, kv_heads, length in ((4, 4, 80), (8, 8, 80), (8, 2, 512)):
            generator = torch.Generator().manual_seed(0)
            query = torch.randn(32, 1, heads, 64, generator=generator).to(dtype)
            caches = torch.randn(8, 2, 32, kv_heads, length, 64, generator=generator).to(dtype)
            mask = torch.zeros(32, 1, 1, length, dtype=dtype)
            options = {"attn_mask": mask, "enable_gqa": heads != kv_heads}

            def ours(query: Any = query, caches: Any = caches, mask: Any = mask) -> None:
                for key, value in caches:
                    one_token(query, key, value, mask)

            def theirs(query: Any = query, caches: Any = caches, options: Any = options) -> None:
                for key, value in caches:
                    scaled_dot_product_attention(query.transpose(1, 2), key, value, **options)

            seconds, _ = measure({"theirs": theirs, "ours": ours}, 20 * repeats)
            shape = f"{heads} heads, {kv_heads} of keys, {length} tokens, {str(dtype).removeprefix('torch.')}"
            micro = [1e6 * seconds[way] / 8 for way in ("theirs", "ours")]
            rows.append([shape, f"{micro[0]:.0f}", f"{micro[1]:.0f}", f"{micro[0] / micro[1]:.2f}"])
    return table(rows, ["one token, 32 rows", "scaled_dot_product_attention [us]", "two products", "times as fast"])


def main() -> None:
    """Every shape and dtype, and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["10M", "50M"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--save", action="store_true", help="write results/DATE_audit.md")
    asked = parser.parse_args()
    from transformers import LlamaForCausalLM

    rows, shared = [], []
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "tokenizer.model"
        train_tokenizer(library_files(2_000_000, seed=0), file, VOCAB, options=ReadOptions(text_suffixes=(".py",)))
        texts = passages(asked.probes, load_tokenizer(file))
        prompts = [text[:PROMPT] for text in texts]
        for name in asked.shapes:
            for dtype in (torch.float32, torch.bfloat16):
                folder = Path(temporary) / f"{name}_{dtype}"
                write_model(folder, SHAPES[name], dtype, file)
                hf = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(asked.device).eval()
                own = for_decoding(load_model(folder, asked.device)[0])

                def peer(hf: Any = hf) -> list[list[int]]:
                    return theirs(hf, texts, asked.batch)

                def ours(own: Any = own) -> list[list[int]]:
                    return generate(own, None, prompts, max_new_tokens=SUFFIX, batch_size=asked.batch)

                def scored(own: Any = own) -> Any:
                    return token_scores(own, texts, batch_size=asked.batch)

                written = ours()
                whole: dict[float, list[list[int]]] = {}
                for share in SHARES:
                    recited = round(share * len(texts))
                    suffixes = [*written[:recited], *(text[PROMPT:] for text in texts[recited:])]
                    whole[share] = [prompt + suffix for prompt, suffix in zip(prompts, suffixes, strict=True)]

                same = partial(their_audit, hf, texts, asked.batch)
                ways: dict[str, Callable[[], Any]] = {"theirs": peer, "with scores": same, "ours": ours}
                ways["scored"] = scored
                ways |= {f"audit {share:.0%}": partial(audit, own, whole[share], asked.batch) for share in SHARES}
                seconds, results = measure(ways, asked.repeats)
                equal = sum(a == b for a, b in zip(results["theirs"], results["ours"], strict=True))
                rate = {way: len(texts) / taken for way, taken in seconds.items()}
                rows.append(
                    [
                        f"{name}, {str(dtype).removeprefix('torch.')}",
                        f"{rate['theirs']:.1f}",
                        f"{rate['with scores'] / rate['theirs']:.2f}",
                        f"{rate['ours']:.1f}",
                        f"{rate['ours'] / rate['theirs']:.2f}",
                        f"{rate['scored'] / rate['theirs']:.2f}",
                        *(f"{rate[f'audit {share:.0%}'] / rate['theirs']:.2f}" for share in SHARES),
                        f"{equal} of {len(texts)}",
                    ]
                )
                print(table(rows[-1:], HEAD), flush=True)
                if asked.device == "cpu":
                    found = spread(folder, dtype, whole, asked, rate["theirs"])
                    shared.append([rows[-1][0], *found])
                    print(table(shared[-1:], SHARED), flush=True)
    text = f"{PROMPT} tokens given, {SUFFIX} asked for, {asked.probes} probes in batches of {asked.batch}, vocabulary "
    text += f"{VOCAB}, on {torch.cuda.get_device_name() if asked.device == 'cuda' else 'the CPU'}.\n\n"
    text += table(rows, HEAD)
    if asked.device == "cpu":
        text += f"\n\n{table(shared, SHARED)}\n\n{products(asked.repeats)}\n\n{attention(asked.repeats)}"
    print(text)
    if asked.save:
        print(save("audit", text))


HEAD = [
    "model", "transformers [probes/s]", "with scores, ratio", "megafish [probes/s]", "ratio", "scored, ratio",
    *(f"audit, {share:.0%} recited" for share in SHARES), "equal texts",
]  # fmt: skip

SHARED = [
    "a process a core, of transformers in one", "transformers", "with scores", "megafish",
    *(f"audit, {share:.0%} recited" for share in SHARES),
]  # fmt: skip

if __name__ == "__main__":
    main()
