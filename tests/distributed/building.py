"""Worker of test_zero: memory while a model is built, and whether its weights are those of one that is built alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megafish.config import load_config
from megafish.model.transformer import Transformer
from megafish.train.engine import Engine, building, start_processes


def status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    output, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    processes = start_processes("cpu")
    config = load_config("tiny", overrides)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    with building(config, processes):
        model = Transformer(config.model, 512)
    shares = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    result = {
        "peak": status("VmHWM") - before,
        "tensors": sum(share.numel() * share.element_size() for share in shares),
    }
    engine = Engine(config, model, processes)
    result["after_engine"] = status("VmHWM") - before
    alone = Transformer(config.model, 512)
    expected = {name: parameter.detach().flatten() for name, parameter in alone.named_parameters()}
    pieces = engine.pieces()
    checked = torch.tensor(sum(piece.end - piece.begin for piece in pieces))
    dist.all_reduce(checked)
    equal = all(torch.equal(p.states["master"], expected[p.parameter][p.begin : p.end]) for p in pieces)
    everywhere = torch.tensor(int(equal))
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    result["parameters"] = sum(map(len, expected.values()))
    result["equal"] = bool(everywhere) and int(checked) == result["parameters"]
    if processes.is_main:
        Path(output).write_text(json.dumps(result))
    dist.barrier()
