"""Some ten seconds of real work: the loss, the mask, a collective, and a training run in two processes. Each check is a
process of its own, so that a crash or a hang is told and not suffered.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megafish.doctor.child import command, describe

SECONDS = 120
"""After which a check counts as hung. All take some ten on two cores; a first import from a network disk is slow."""

# What the goldfish-v1 contract (docs/mask.md) drops of the tokens i * 2654435761 mod 32000, i below 128, k=4, h=13.
_TOKENS = [i * 2654435761 % 32000 for i in range(128)]
_DROPPED = "0000100d44a010a884820100940a0582"


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    passed: bool
    detail: str
    seconds: float


def run_checks(gpus: int = 0) -> list[Check]:
    """All checks, two at a time. `gpus`: those that torch sees."""
    processes = {"mask": 1, "loss": 1, "collective": gpus or 2, "training": min(2, gpus) or 2}
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="megafish-doctor-") as folder, ThreadPoolExecutor(max_workers=2) as pool:
        try:
            return list(pool.map(lambda name: _run(name, processes[name], Path(folder), stop), processes))
        finally:
            stop.set()  # at Ctrl-C: the pool waits for its threads, and they for processes that know nothing of it


def _run(name: str, count: int, folder: Path, stop: threading.Event) -> Check:
    started = time.monotonic()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(count)}
    # Files, not pipes: a process that says much would wait for its reader.
    logs = [folder / f"{name}_{rank}.log" for rank in range(count)]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            with log.open("wb") as file:
                workers.append(
                    subprocess.Popen(
                        command("from megafish.doctor.selftest import main; main()", name, str(folder)),
                        env={**os.environ, **meeting, **place},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        failure = _watch(workers, logs, started + SECONDS, stop)
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    said = (logs[0].read_text(encoding="utf-8", errors="replace").splitlines() or ["it said nothing"])[-1]
    return Check(name, failure is None, failure or said, time.monotonic() - started)


def _watch(
    workers: list[subprocess.Popen[bytes]], logs: list[Path], deadline: float, stop: threading.Event
) -> str | None:
    """Wait for all; what is wrong with the first that fails, whose fellows may wait for it for ever."""
    while True:
        codes = [worker.poll() for worker in workers]
        for code, log in zip(codes, logs, strict=True):
            if code:
                said = log.read_text(encoding="utf-8", errors="replace")
                return describe(code, said)
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > deadline:
            return f"no answer after {SECONDS} s"
        if stop.wait(0.05):
            return "interrupted"


def check_mask() -> str:
    """The mask's decisions against the contract's, bit for bit."""
    import numpy as np
    import torch

    from megafish_kernels import goldfish_drop

    ids = np.array(_TOKENS)
    masks = {"NumPy": np.asarray(goldfish_drop(ids, k=4, h=13))}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        masks[f"torch on {device}"] = goldfish_drop(torch.from_numpy(ids).to(device), k=4, h=13).cpu().numpy()
    for where, drop in masks.items():
        found = np.packbits(drop).tobytes().hex()
        if found != _DROPPED:
            raise SystemExit(f"{where}: drops {found}, the contract {_DROPPED}: runs here cannot be compared")
    dropped = int(masks["NumPy"].sum())
    return f"goldfish-v1 drops {dropped} of {len(_TOKENS)} tokens in {' and '.join(masks)}, as the contract says"


def check_loss() -> str:
    """The fused loss and its gradients against float64, where the trainer would compute them."""
    import torch
    from torch.nn import functional as F

    from megafish_kernels import linear_cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, generator=generator)
    weight = torch.randn(1000, 64, generator=generator)
    targets = torch.randint(0, 1000, (256,), generator=generator)
    inputs = [x.clone().to(device).requires_grad_() for x in (hidden, weight)]
    loss = linear_cross_entropy(inputs[0], inputs[1], targets.to(device))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    want = F.cross_entropy(exact[0] @ exact[1].T, targets)
    want.backward()
    worst = abs(float(loss.detach()) - float(want.detach())) / float(want.detach())
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        error = (ours.grad.cpu().double() - theirs.grad).norm() / theirs.grad.norm()
        worst = max(worst, float(error))
    if not worst < 1e-3:
        raise SystemExit(f"the fused loss on {device} is off by {worst:.1e} of float64's")
    return f"loss and gradients on {device} within {worst:.0e} of float64's"


def check_collective() -> str:
    """A sum over all processes, whose result is known exactly."""
    from datetime import timedelta

    import torch
    from torch import distributed

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=SECONDS / 2))
    numbers = torch.arange(1 << 20, device=device, dtype=torch.float32) + rank
    distributed.all_reduce(numbers)
    distributed.barrier()
    # Below 2^24, whole numbers are exact in any order of summation for up to 15 processes.
    want = world * torch.arange(1 << 20, dtype=torch.float64) + world * (world - 1) / 2
    if not torch.allclose(numbers.cpu().double(), want, rtol=1e-6, atol=0):
        raise SystemExit(f"the sum over {world} processes by {backend} is wrong")
    return f"{world} process{'es' * (world > 1)} sum 4 MiB over {backend}"


def check_training(folder: Path) -> str:
    """Corpus, two steps in all processes, a checkpoint that is read back."""
    import numpy as np
    import torch

    from megafish.config import load_config
    from megafish.data.indexed import IndexedWriter
    from megafish.data.readers import ReadOptions
    from megafish.data.tokenizer import train_tokenizer
    from megafish.model.load import load_run
    from megafish.train.engine import start_processes
    from megafish.train.loop import train

    torch.set_num_threads(1)
    processes = start_processes("auto")
    if processes.is_main:
        (folder / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
        trained = train_tokenizer([folder / "text.txt"], folder / "tokenizer.model", 400, options=ReadOptions())
        with IndexedWriter(folder / "corpus", "uint16") as writer:
            writer.append(np.array(trained.encode((folder / "text.txt").read_text(encoding="utf-8"))))
    torch.distributed.barrier()
    config = load_config(
        "tiny",
        [
            f"data={{train: {folder}/corpus, tokenizer: {folder}/tokenizer.model, sequence_length: 64}}",
            f"run_dir={folder}/run",
            "model={num_layers: 1, hidden_size: 64, num_heads: 2, intermediate_size: 128}",
            "engine.zero_stage=2",
            "train={steps: 2, global_batch_size: 4, micro_batch_size: 2}",
            "checkpoint.interval=null",
        ],
    )
    outcome = train(config)
    if processes.is_main and load_run(outcome.run.path, device="cpu").step != 2:
        raise SystemExit("the checkpoint of a run of two steps is not of step 2")
    backend = torch.distributed.get_backend()
    return f"two steps of ZeRO 2 in {processes.world_size} processes over {backend}, checkpoint read back"


def main() -> None:
    """One check, in this process."""
    name, folder = sys.argv[1:]
    checks = {
        "mask": check_mask,
        "loss": check_loss,
        "collective": check_collective,
        "training": lambda: check_training(Path(folder)),
    }
    found = checks[name]()
    print(found, flush=True)
    # Without the interpreter's end: threads of libraries have been seen to abort there, with all work done.
    os._exit(0)
