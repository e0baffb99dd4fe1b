"""docs/slurm.md: the walk from no Slurm to a finished two-node run, executed as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster import SCRIPT, Slurm

PAGE = SCRIPT.parents[1] / "docs" / "slurm.md"


def test_every_command_of_the_walk_runs(slurm: Slurm, tmp_path: Path) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    (tmp_path / "launch").symlink_to(SCRIPT.parent)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    try:
        done = subprocess.run(
            ["bash", "-exo", "pipefail", "-c", "\n".join(blocks)], cwd=tmp_path, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    finally:
        subprocess.run(["bash", SCRIPT, "stop"], env=env)
    shown = done.stdout.split("+ megafish logs runs/two-nodes --follow")[1]
    assert "2 x cpu" in shown and "exit code 0: the run is complete" in shown
    assert re.search(r"runs/two-nodes +completed +5 +100%", shown)
    assert "#SBATCH --nodes=4" in shown
    assert not list(tmp_path.glob("megafish-slurm*"))
