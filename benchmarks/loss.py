"""The output head and its loss, forward and backward, on a CPU: time and peak memory against torch's own.

    python benchmarks/loss.py                      the table
    python benchmarks/loss.py --vocab 32768 --repeats 5 --save

Peers: full logits with F.cross_entropy, and torch.nn.functional.linear_cross_entropy, unfused and chunked. Dropped
tokens are ignored targets in all of them. "products" is what no implementation can do without: the three matrix
products over the kept tokens alone, in megafish's chunks and nothing between them; its loss is no loss. Every
measurement is a process of its own, and the methods take turns, so that a change of the machine's load meets all of
them. Memory is what the step adds to the process's peak, with the gradients of the hidden states and the weight.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from common import Isolated, machine, peak_rss, reset_peak_rss, run_isolated, save, table
from torch import Tensor

from megafish_kernels import goldfish_drop, linear_cross_entropy
from megafish_kernels.torch_backend import chunk_rows

METHODS = ("megafish", "products", "full logits", "torch unfused", "torch chunked")


def loss_of(method: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if method == "megafish":
        loss = linear_cross_entropy(hidden, weight, targets)
        assert isinstance(loss, Tensor)
        return loss
    if method == "full logits":
        return F.cross_entropy(hidden @ weight.T, targets)
    options = torch.nn.LinearCrossEntropyOptions() if method == "torch chunked" else None
    return F.linear_cross_entropy(hidden, weight, targets, options=options)


def run_once(method: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Forward and backward; the loss."""
    if method == "products":
        return products(hidden, weight, targets)
    loss = loss_of(method, hidden, weight, targets)
    loss.backward()
    return loss.detach()


def products(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits, and from numbers in their place the gradients of hidden and weight, for the kept tokens alone."""
    with torch.no_grad():
        kept = hidden[targets != -100]
        size = chunk_rows(len(kept), len(weight), kept.dtype, None)
        logits = kept.new_empty(size, len(weight))
        grad_hidden, grad_weight = torch.empty_like(kept), torch.empty_like(weight)
        for begin in range(0, len(kept), size):
            rows = kept[begin : begin + size]
            chunk = torch.mm(rows, weight.t(), out=logits[: len(rows)])
            torch.mm(chunk, weight, out=grad_hidden[begin : begin + size])
            torch.addmm(grad_weight, chunk.t(), rows, beta=float(begin > 0), out=grad_weight)
    hidden.grad, weight.grad = torch.zeros_like(hidden), grad_weight
    hidden.grad[targets != -100] = grad_hidden
    return grad_weight[0, 0]


def step(method: str, tokens: int, dim: int, vocab: int, k: int | None, steps: int, threads: int) -> dict[str, float]:
    """Median seconds of `steps` steps, CPU seconds, bytes that they add to the peak, and the loss."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, dim, generator=generator) * dim**-0.5).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[goldfish_drop(targets, k=k)] = -100
    # The products' own buffers and code are set up here, and counted for no method.
    run_once(method, hidden[:64], weight[:128], targets[:64].clamp(max=127))
    hidden.grad = weight.grad = None

    base = reset_peak_rss()
    wall, cpu, value = [], [], 0.0
    for _ in range(steps):
        hidden.grad = weight.grad = None
        begin, begin_cpu = time.perf_counter(), time.process_time()
        loss = run_once(method, hidden, weight, targets)
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
        value = loss.item()
        del loss
    return {
        "wall": statistics.median(wall),
        "cpu": statistics.median(cpu),
        "bytes": float(peak_rss() - base),
        "loss": value,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_768, 131_072], help="rows of the weight")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--dim", type=int, nargs="+", default=[512, 2048], help="width of the hidden states")
    parser.add_argument("--k", type=int, nargs="+", default=[0, 4, 50], help="drop one in k tokens; 0 drops none")
    parser.add_argument("--steps", type=int, default=3, help="steps of one process, of which the median counts")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each method, of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--save", action="store_true", help="write results/DATE_loss.md")
    args = parser.parse_args()

    header = ["D, V, k, method", "s a step", "time ratio", "CPU s", "MiB added", "beyond gradients", "ratio", "loss"]
    rows: list[list[str]] = []
    for dim, vocab, k in itertools.product(args.dim, args.vocab, args.k):
        runs: dict[str, list[Isolated]] = {method: [] for method in METHODS}
        for repeat in range(args.repeats):
            for method in METHODS:
                progress = f"D={dim} V={vocab} k={k or 'off'} {repeat + 1}/{args.repeats} {method}"
                print(progress, file=sys.stderr, flush=True)
                run = run_isolated(step, method, args.tokens, dim, vocab, k or None, args.steps, args.threads)
                runs[method].append(run)
        middle = {
            method: {
                name: statistics.median(run.result[name] for run in done) for name in ("wall", "cpu", "bytes", "loss")
            }
            for method, done in runs.items()
        }
        gradients = 4 * dim * (args.tokens + vocab)
        ours = middle["megafish"]
        for method, figures in middle.items():
            extra = figures["bytes"] - gradients
            rows.append(
                [
                    f"{dim}, {vocab // 1024}k, {k or 'off'}, {method}",
                    f"{figures['wall']:.2f}",
                    f"{figures['wall'] / ours['wall']:.2f}",
                    f"{figures['cpu']:.2f}",
                    f"{figures['bytes'] / 2**20:.0f}",
                    f"{extra / 2**20:.0f}",
                    f"{extra / (ours['bytes'] - gradients):.1f}",
                    "" if method == "products" else f"{figures['loss']:.5f}",
                ]
            )
    text = (
        f"{args.tokens} tokens, fp32, {args.threads} threads; forward and backward. Medians of {args.repeats} "
        f"processes of {args.steps} steps. Ratios are to megafish: above 1, megafish is better. Memory is what a step "
        "adds to the process's peak, and what of it is beyond the gradients of the hidden states and the weight.\n\n"
    )
    text += table(rows, header)
    print(f"{machine()}\n\n{text}")
    if args.save:
        print(f"saved {save('loss', text)}")


if __name__ == "__main__":
    main()
