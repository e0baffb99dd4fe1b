from __future__ import annotations

from typing import Any

import pytest

from megafish.audit.levels import rate
from megafish.audit.verdict import verdict


def summary(*levels: tuple[int, int, int]) -> dict[str, Any]:
    """Levels of (copies, recited, passages)."""
    found = [
        {"exposures": copies, "canaries": count, **rate("exact", [True] * hits + [False] * (count - hits))}
        for copies, hits, count in levels
    ]
    return {"extraction": {"levels": found} if found else None}


@pytest.mark.parametrize(
    ("levels", "recites"),
    [
        (((0, 0, 16), (1, 0, 16), (128, 16, 16)), True),
        (((0, 0, 16), (128, 0, 16)), False),
        (((0, 0, 16), (128, 1, 16)), False),  # one of 16 is not beyond chance
        (((0, 8, 16), (128, 8, 16)), False),  # the control group comes out as often
        (((1, 0, 16), (128, 16, 16)), None),  # no control group
        (((0, 0, 16),), None),
        ((), None),
    ],
)
def test_verdict(levels: tuple[tuple[int, int, int], ...], recites: bool | None) -> None:
    found = verdict(summary(*levels))
    assert found["recites"] is recites
    if recites is None:
        assert found["text"].startswith("no verdict")
        return
    assert found["difference_low"] <= found["rate"] - found["control_rate"] <= found["difference_high"]
    assert f"{levels[-1][1]} of {levels[-1][2]} passages with {levels[-1][0]} copies" in found["text"]
    assert ("it recites" in found["text"]) == recites
