"""Twenty seconds of real work: the loss, the mask, and a training run in two processes. Each check is a process of its
own, so that a crash or a hang is told and not suffered.

`python -m megafish.doctor.selftest CHECK FOLDER` runs one; what it prints last is what it has found.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120
"""After which a check counts as hung. It takes about ten on two cores."""

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


def run_checks() -> list[Check]:
    """All checks, two at a time."""
    with tempfile.TemporaryDirectory(prefix="megafish-doctor-") as folder, ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda name: _run(name, Path(folder)), ("mask", "loss", "training")))


def _run(name: str, folder: Path) -> Check:
    started = time.monotonic()
    ranks = range(_processes() if name == "training" else 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    workers = []
    for rank in ranks:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(ranks)), "OMP_NUM_THREADS": "1"}
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "megafish.doctor.selftest", name, str(folder)],
                env={**os.environ, **meeting, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    said, failed = "", None
    for worker in workers:
        try:
            output = worker.communicate(timeout=max(1.0, started + SECONDS - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            failed = failed or f"no answer after {SECONDS} s"
            os.killpg(worker.pid, signal.SIGKILL)
            output = worker.communicate()[0]
        lines = [line for line in output.splitlines() if line.strip()] or ["it said nothing"]
        if worker.returncode and failed is None:
            code = worker.returncode
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            failed = f"{lines[-1].strip()} ({how})"
        said = said or lines[-1].strip()
    return Check(name, failed is None, failed or said, time.monotonic() - started)


def _processes() -> int:
    """Two, or the GPUs of this machine up to two where there are any."""
    import torch

    return min(2, torch.cuda.device_count()) or 2


def check_mask() -> str:
    """The mask's decisions against the contract's, bit for bit."""
    import numpy as np

    from megafish_kernels import goldfish_drop

    drop = goldfish_drop(np.array(_TOKENS), k=4, h=13)
    found = np.packbits(np.asarray(drop)).tobytes().hex()
    if found != _DROPPED:
        raise SystemExit(f"goldfish-v1 drops {found}, the contract {_DROPPED}: runs of this machine cannot be compared")
    return f"goldfish-v1 drops {int(np.asarray(drop).sum())} of {len(_TOKENS)} tokens, as the contract says"


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
    found = {"mask": check_mask, "loss": check_loss, "training": lambda: check_training(Path(folder))}[name]()
    print(found, flush=True)
    # Without the interpreter's end: threads of libraries have been seen to abort there, with all work done.
    os._exit(0)


if __name__ == "__main__":
    main()
