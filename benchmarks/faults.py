"""Kill, damage, fill and hang real training runs, resume each with the same command, and see whether anything is lost.

    python benchmarks/faults.py                                                    the campaign: about an hour
    python benchmarks/faults.py --kills 10 --damages 2 --full-disks 1 --hangs 1    a small one

Every run is `megafish train tiny ... --resume` in processes of its own, over gloo, in turn with every layout. After
each fault it is started again by the same command until it ends; then its weights and metrics must be those of a run
that nobody disturbed, bit for bit, and no fault may have cost more steps than lay behind the last complete checkpoint.

- kills: SIGKILL or SIGTERM to the launcher's whole family or to one process, at a random moment of the whole life of a
  process (start-up included), of training, or of a save.
- damages: one random file of the latest checkpoint is cut short, or one random bit of it is turned over.
- full disks: the run directory is a small file system of its own, which is enlarged after the run has failed. It is
  mounted in a user namespace, for which no rights are needed where the kernel allows one.
- hangs: one process of two is stopped (SIGSTOP) at a random moment of training; the other must name it and end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from common import machine, save, table

_SPLIT = ("--valid-fraction", "0.2", "--workers", "1")
STEPS, INTERVAL = 60, 5
# What counts as a stall within a step, and in start-up, evaluation and saving.
STALL_SECONDS, SLOW_STALL_SECONDS = 15, 90
LIMIT = 300.0  # seconds after which a process that should have ended is a failure of the campaign
TIMINGS = {"time", "tokens_per_s", "model_flops_per_s", "mfu", "memory_bytes"}


class Layout(NamedTuple):
    """How many processes train, at which ZeRO stage."""

    processes: int
    stage: int

    def __str__(self) -> str:
        return f"{self.processes} x ZeRO {self.stage}"


LAYOUTS = (Layout(1, 0), Layout(1, 3), Layout(2, 1), Layout(2, 2), Layout(2, 3))


class Broken(AssertionError):
    """Something was lost: what the campaign looks for."""


@dataclass
class Fault:
    """One fault and what it cost."""

    kind: str
    layout: Layout
    lost_steps: int | None = None
    """Steps that the run had logged and must make again; None where it had logged none."""
    seconds: float | None = None
    """From the fault to the end of the last process."""
    code: int | None = None


@dataclass
class Campaign:
    """Where it runs, its random choices, and what came of it."""

    folder: Path
    corpus: Path
    random: random.Random
    references: dict[Layout, tuple[str, dict[str, Any], float]] = field(default_factory=dict)
    """Digest of the weights, the metrics, and the seconds an undisturbed run takes."""
    faults: list[Fault] = field(default_factory=list)
    lives: int = 0

    def command(self, layout: Layout, run: Path) -> list[str]:
        launcher = [sys.executable]
        if layout.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.processes}"]
        return [
            *(*launcher, "-m", "megafish", "train", "tiny", "--resume", f"run_dir={run}", f"data.train={self.corpus}"),
            "model={num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, intermediate_size: 128}",
            *("data.sequence_length=64", "train.precision=fp32", f"engine.zero_stage={layout.stage}"),
            *("train.global_batch_size=8", "train.micro_batch_size=4", f"train.steps={STEPS}", "optimizer.lr=2e-3"),
            *(f"checkpoint.interval={INTERVAL}", "eval={interval: 10, sequences: 8, dropped_sequences: 8}"),
            f"guard={{stall_seconds: {STALL_SECONDS}, slow_stall_seconds: {SLOW_STALL_SECONDS}}}",
        ]

    def start(self, layout: Layout, run: Path) -> subprocess.Popen[bytes]:
        run.parent.mkdir(parents=True, exist_ok=True)
        with open(run.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(
                self.command(layout, run),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, layout: Layout, run: Path) -> None:
        """Resume until the end, without further faults, and compare with the undisturbed run."""
        code = self.start(layout, run).wait(LIMIT)
        if code:
            raise Broken(f"{run}: the resumed run ended with code {code}:\n{log_tail(run)}")
        weights, metrics, _ = self.references[layout]
        if metrics_of(run) != metrics:
            raise Broken(f"{run}: its metrics are not those of an undisturbed run")
        if weights_of(run) != weights:
            raise Broken(f"{run}: its weights are not those of an undisturbed run")

    def new_run(self, kind: str) -> Path:
        self.lives += 1
        return self.folder / f"{kind}_{self.lives:04d}" / "run"

    def done(self, run: Path) -> None:
        shutil.rmtree(run.parent)

    def note(self, fault: Fault) -> None:
        self.faults.append(fault)
        count = sum(other.kind.split(",")[0] == fault.kind.split(",")[0] for other in self.faults)
        lost = "" if fault.lost_steps is None else f", {fault.lost_steps} steps to make again"
        print(f"{fault.kind.split(',')[0]} {count}: {fault.kind} ({fault.layout}), code {fault.code}{lost}", flush=True)


def log_tail(run: Path, lines: int = 30) -> str:
    return "\n".join(run.with_suffix(".log").read_text(errors="replace").splitlines()[-lines:])


def metrics_of(run: Path) -> dict[str, Any]:
    """Every figure that the run logged for its steps and evaluations, timings aside."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        f"{line['kind']} {line['step']}": {key: value for key, value in line.items() if key not in TIMINGS}
        for line in lines
        if line["kind"] in ("train", "valid", "dropped")
    }


def logged_step(run: Path) -> int | None:
    """The last step of metrics.jsonl; None without any."""
    with contextlib.suppress(FileNotFoundError):
        for line in reversed((run / "metrics.jsonl").read_text().splitlines()):
            with contextlib.suppress(ValueError):
                return int(json.loads(line)["step"])
    return None


def latest_step(run: Path) -> int:
    """The step a resume starts from; 0 without a checkpoint."""
    with contextlib.suppress(FileNotFoundError):
        return int((run / "latest").read_text().strip().removeprefix("step_"))
    return 0


def weights_of(run: Path) -> str:
    """Digest of the final weights, as `megafish generate` loads them."""
    import torch

    from megafish.model.load import load_run

    digest = hashlib.sha256()
    for name, tensor in sorted(load_run(run).model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The started process and its descendants, the training processes last and by rank."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *sorted(parent.children(recursive=True), key=lambda child: child.pid)]
    return []


def send(members: list[psutil.Process], number: signal.Signals) -> None:
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)


def end(process: subprocess.Popen[bytes], members: list[psutil.Process]) -> int:
    """Wait until the whole family is gone; its code."""
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        send([*members, *family(process)], signal.SIGKILL)
        raise Broken(f"still running {LIMIT:.0f} s after the fault: {process.args}") from None
    _, alive = psutil.wait_procs(members, timeout=60)
    if alive:
        send(alive, signal.SIGKILL)
        raise Broken(f"processes outlived their launcher by a minute: {alive}")
    return code


# ---------------------------------------------------------------------------------------------------------------- kills


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> bool:
    """Poll until the condition holds; False when the process ended before."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def wait_for_moment(campaign: Campaign, moment: str, layout: Layout, run: Path, process: Any) -> bool:
    """Sleep until a random moment of the kind; False when the run ended before."""
    whole = campaign.references[layout][2]
    if moment == "any moment":
        deadline = time.monotonic() + campaign.random.uniform(0, whole)
        return not wait_for(lambda: time.monotonic() > deadline, process) or process.poll() is None
    if moment == "a save":
        if not wait_for(lambda: any(run.glob("checkpoints/*.tmp")), process):
            return False
        time.sleep(campaign.random.uniform(0, 0.05))
        return process.poll() is None
    begun = logged_step(run) or 0
    wanted = begun + campaign.random.randint(1, max(1, STEPS - begun - 1))
    return wait_for(lambda: (logged_step(run) or 0) >= wanted, process)


def kill(campaign: Campaign, layout: Layout, run: Path) -> Fault | None:
    """Start the run and kill it; None when it came to its end first."""
    before = latest_step(run)
    process = campaign.start(layout, run)
    moment = campaign.random.choice(["any moment", "training", "a save"])
    struck = wait_for_moment(campaign, moment, layout, run, process)
    members = family(process)  # empty when the run has ended in this very moment
    if not struck or not members:
        code = process.wait(LIMIT)
        if code:
            raise Broken(f"{run}: ended with code {code} before its fault:\n{log_tail(run)}")
        return None
    number = campaign.random.choice([signal.SIGKILL, signal.SIGTERM])
    workers = [member for member in members if is_worker(member)] or members
    if layout.processes > 1 and campaign.random.random() < 0.5:
        whom, targets = "one rank", [campaign.random.choice(workers)]
    elif number == signal.SIGKILL:
        whom, targets = "all", members
    else:
        whom, targets = "all", members[:1]  # a launcher passes SIGTERM on
    begun = time.monotonic()
    send(targets, number)
    code = end(process, members)
    seconds = time.monotonic() - begun
    reached, after = logged_step(run), latest_step(run)
    if after < before:
        raise Broken(f"{run}: latest went back from step {before} to {after}")
    lost = None if reached is None else max(0, reached - after)
    # A checkpoint is written beside the next steps, and at most one at a time.
    if lost is not None and lost > 2 * INTERVAL:
        raise Broken(f"{run}: at step {reached} its last complete checkpoint was that of step {after}")
    return Fault(f"kill, {number.name} to {whom}, {moment}", layout, lost, seconds, code)


def is_worker(member: psutil.Process) -> bool:
    """Whether it is a training process, not a launcher."""
    try:
        command = member.cmdline()
    except psutil.NoSuchProcess:
        return False
    return "megafish" in command and "torch.distributed.run" not in command


def kills(campaign: Campaign, wanted: int, layouts: Iterator[Layout]) -> None:
    done = 0
    while done < wanted:
        layout, run = next(layouts), campaign.new_run("kill")
        for _ in range(campaign.random.randint(2, 6)):
            fault = kill(campaign, layout, run) if done < wanted else None
            if fault is None:
                break
            done += 1
            campaign.note(fault)
        campaign.finish(layout, run)
        campaign.done(run)


# ---------------------------------------------------------------------------------------- damages, full disks and hangs


def run_to_a_checkpoint(campaign: Campaign, layout: Layout, run: Path) -> None:
    """Start the run and kill it once it has two checkpoints or more."""
    process = campaign.start(layout, run)
    wanted = campaign.random.randint(2, STEPS // INTERVAL - 1) * INTERVAL
    if not wait_for(lambda: latest_step(run) >= wanted, process):
        raise Broken(f"{run}: ended too early:\n{log_tail(run)}")
    members = family(process)
    send(members, signal.SIGKILL)
    end(process, members)


def damage(campaign: Campaign, layout: Layout) -> None:
    """Cut short or turn a bit of one file of the latest checkpoint."""
    run = campaign.new_run("damage")
    run_to_a_checkpoint(campaign, layout, run)
    latest = run / "checkpoints" / f"step_{latest_step(run):08d}"
    file = campaign.random.choice(sorted(path for path in latest.rglob("*") if path.is_file()))
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        if campaign.random.random() < 0.5:
            kind, place = "cut short", campaign.random.randrange(size)
            handle.truncate(place)
        else:
            kind, place = "a bit turned", campaign.random.randrange(size)
            handle.seek(place)
            byte = handle.read(1)[0]
            handle.seek(place)
            handle.write(bytes([byte ^ (1 << campaign.random.randrange(8))]))
    marker = run.with_suffix(".log").stat().st_size
    campaign.finish(layout, run)
    said = run.with_suffix(".log").read_bytes()[marker:].decode(errors="replace")
    if latest.name not in said or "damaged" not in said:
        raise Broken(f"{file}: {kind}, and the resumed run did not say so:\n{said}")
    campaign.note(Fault(f"damage, {kind} ({file.relative_to(latest)})", layout, code=0))
    campaign.done(run)


def full_disk(campaign: Campaign, layout: Layout) -> None:
    """A run on a file system that fills up while it saves, enlarged afterwards."""
    run = campaign.new_run("full_disk")
    run.mkdir(parents=True)
    whole = campaign.references[layout]
    one = checkpoint_bytes(campaign, layout)
    size = int(one * campaign.random.uniform(1.2, 3.9))  # the run keeps three
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run)], check=True)
    try:
        process = campaign.start(layout, run)
        begun = time.monotonic()
        code = end(process, family(process))
        if code == 0:
            raise Broken(f"{run}: ended well on {size} bytes, of which it needs more")
        if "no space" not in log_tail(run, lines=100):
            raise Broken(f"{run}: the disk was full, and no line says so:\n{log_tail(run)}")
        fault = Fault("full disk", layout, None, time.monotonic() - begun, code)
        reached = logged_step(run)
        fault.lost_steps = None if reached is None else reached - latest_step(run)
        subprocess.run(["mount", "-o", f"remount,size={one * 40}", str(run)], check=True)
        campaign.finish(layout, run)
        assert whole is campaign.references[layout]
    finally:
        subprocess.run(["umount", str(run)], check=True)
    campaign.note(fault)
    campaign.done(run)


def checkpoint_bytes(campaign: Campaign, layout: Layout) -> int:
    folder = campaign.folder / f"reference_{layout.processes}_{layout.stage}" / "run" / "checkpoints"
    newest = max(folder.iterdir())
    return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def hang(campaign: Campaign, layout: Layout) -> None:
    """Stop one process; the others must name it and end in time."""
    run = campaign.new_run("hang")
    process = campaign.start(layout, run)
    if not wait_for_moment(campaign, "training", layout, run, process):
        raise Broken(f"{run}: ended before its fault:\n{log_tail(run)}")
    members = family(process)
    workers = [member for member in members if is_worker(member)]
    victim = campaign.random.choice(workers)
    rank = int(victim.environ()["RANK"])
    begun = time.monotonic()
    send([victim], signal.SIGSTOP)
    code = end(process, members)
    seconds = time.monotonic() - begun
    said = log_tail(run, lines=100)
    if f"error: stalled: late: rank {rank} " not in said:
        raise Broken(f"{run}: rank {rank} was stopped, and no line names it:\n{said}")
    if code == 0:
        raise Broken(f"{run}: a run that hung ended with code 0")
    reached = logged_step(run)
    lost = None if reached is None else max(0, reached - latest_step(run))
    campaign.finish(layout, run)
    campaign.note(Fault("hang", layout, lost, seconds, code))
    campaign.done(run)


# --------------------------------------------------------------------------------------------------------- the campaign


def make_corpus(folder: Path) -> Path:
    """Python's own json, email and logging packages as a corpus."""
    library = Path(sysconfig.get_paths()["stdlib"])
    inputs = [str(library / name) for name in ("json", "email", "logging")]
    tokenizer, corpus = folder / "tokenizer.model", folder / "corpus"
    for command in (
        ["tokenizer", *inputs, "--output", str(tokenizer), "--vocab-size", "512", "--text-suffix", ".py"],
        ["prepare", *inputs, "--tokenizer", str(tokenizer), "--output", str(corpus), "--text-suffix", ".py", *_SPLIT],
    ):
        subprocess.run([sys.executable, "-m", "megafish", *command], check=True, stdout=subprocess.DEVNULL)
    return corpus


def make_references(campaign: Campaign) -> None:
    for layout in LAYOUTS:
        run = campaign.folder / f"reference_{layout.processes}_{layout.stage}" / "run"
        begun = time.monotonic()
        code = campaign.start(layout, run).wait(LIMIT)
        if code:
            raise Broken(f"{run}: an undisturbed run ended with code {code}:\n{log_tail(run)}")
        campaign.references[layout] = (weights_of(run), metrics_of(run), time.monotonic() - begun)
        print(f"undisturbed ({layout}): {campaign.references[layout][2]:.1f} s", flush=True)


def in_turn(layouts: tuple[Layout, ...]) -> Iterator[Layout]:
    while True:
        yield from layouts


def results(campaign: Campaign) -> str:
    """A row for every kind of fault and target."""
    groups: dict[str, list[Fault]] = {}
    for fault in campaign.faults:
        groups.setdefault(fault.kind.split(" (")[0], []).append(fault)
    rows = []
    for kind, faults in sorted(groups.items()):
        lost = [fault.lost_steps for fault in faults if fault.lost_steps is not None]
        seconds = [fault.seconds for fault in faults if fault.seconds is not None]
        rows.append(
            [
                kind,
                len(faults),
                f"{statistics.mean(lost):.1f}" if lost else "",
                max(lost) if lost else "",
                f"{statistics.median(seconds):.1f}" if seconds else "",
                f"{max(seconds):.1f}" if seconds else "",
                "all",
            ]
        )
    header = ["fault", "times", "steps lost, mean", "most", "s to end, median", "most", "ended bit for bit"]
    layouts = ", ".join(map(str, LAYOUTS))
    return (
        f"Runs of {STEPS} steps with a checkpoint every {INTERVAL}, on {layouts}. Steps lost had been logged and were "
        "made again after the resume. Each run was resumed until its end and compared with an undisturbed one: weights "
        "and metrics, bit for bit.\n\n" + table(rows, header)
    )


def with_own_mounts() -> None:
    """Go on in a user namespace of our own, in which file systems can be mounted; exec, so it returns only inside."""
    if os.environ.get("MEGAFISH_OWN_MOUNTS") or os.geteuid() == 0:
        return
    os.environ["MEGAFISH_OWN_MOUNTS"] = "1"
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        raise SystemExit("error: --full-disks mounts file systems, for which this kernel wants root: --full-disks 0")
    os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=20)
    parser.add_argument("--full-disks", type=int, default=5)
    parser.add_argument("--hangs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    parser.add_argument("--save", action="store_true", help="write results/DATE_faults.md")
    args = parser.parse_args()
    if args.full_disks:
        with_own_mounts()
    folder = Path(tempfile.mkdtemp(prefix="megafish_faults_"))
    begun = time.monotonic()
    campaign = Campaign(folder, make_corpus(folder), random.Random(args.seed))
    make_references(campaign)
    several = tuple(layout for layout in LAYOUTS if layout.processes > 1)
    try:
        for layout, _ in zip(in_turn(several), range(args.hangs), strict=False):
            hang(campaign, layout)
        for layout, _ in zip(in_turn(LAYOUTS), range(args.full_disks), strict=False):
            full_disk(campaign, layout)
        for layout, _ in zip(in_turn(LAYOUTS), range(args.damages), strict=False):
            damage(campaign, layout)
        kills(campaign, args.kills, in_turn(LAYOUTS))
    except Broken as error:
        raise SystemExit(f"BROKEN after {len(campaign.faults)} faults: {error}\nkept: {folder}") from None
    text = results(campaign)
    print(f"{machine()}\n\n{text}\n\n{len(campaign.faults)} faults in {(time.monotonic() - begun) / 60:.0f} minutes")
    if args.save:
        print(f"saved {save('faults', text)}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
