"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "broken", "unused"]


@dataclass(frozen=True)
class Part:
    """Something that megafish uses, or could use."""

    group: str
    name: str
    state: State
    detail: str
    """Version, and what is used of it."""
    purpose: str
    required: bool = False
    remedy: str | None = None
    """Command that puts it right."""

    @property
    def fault(self) -> bool:
        """Whether megafish cannot work like this."""
        return self.required and self.state in ("missing", "broken")
