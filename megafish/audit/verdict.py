"""One sentence about a model, with its interval: does it recite what was planted?"""

from __future__ import annotations

from typing import Any

from megafish.audit.rows import percent
from megafish.audit.statistics import difference_interval


def verdict(summary: dict[str, Any]) -> dict[str, Any]:
    """The most exposed canaries against the control group, as summary["verdict"].

    recites: True where more of them come out word for word than of the control group, beyond chance (the 95 % interval
    of the difference of the rates lies above 0); False where not; None where nothing was planted, or no control kept.
    """
    extraction = summary["extraction"]
    levels = extraction["levels"] if extraction else []
    if len(levels) < 2 or levels[0]["exposures"] != 0:
        return {"recites": None, "text": "no verdict: it needs planted canaries and their control group (0 copies)"}
    control, most = levels[0], levels[-1]
    low, high = difference_interval(
        most["exact_matches"], most["canaries"], control["exact_matches"], control["canaries"]
    )
    recites = low > 0
    found = f"{most['exact_matches']} of {most['canaries']} passages with {most['exposures']} copies"
    interval = (
        f"{percent(most['exact_rate'])}, 95 % interval {percent(most['exact_low'])} to {percent(most['exact_high'])}"
    )
    beside = f"{control['exact_matches']} of {control['canaries']} that were not planted"
    said = "it recites" if recites else "no recitation shown"
    return {
        "recites": recites,
        "exposures": most["exposures"],
        "rate": most["exact_rate"],
        "low": most["exact_low"],
        "high": most["exact_high"],
        "control_rate": control["exact_rate"],
        "difference_low": low,
        "difference_high": high,
        "text": f"{said}: {found} come out word for word ({interval}), {beside}",
    }
