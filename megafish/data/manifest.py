"""The manifest of a corpus folder: its name, its format, and the values that files and programs agree on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megafish.errors import InputError

MANIFEST = "manifest.json"
FORMAT, VERSION = "megafish-corpus", 1

DEFAULT_K = -1
"""goldfish k of a document that sets none: as its source, or else the run, says."""
NEVER_K = 0
"""goldfish k of a document of which nothing is ever dropped."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus folder. Raises InputError where it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: a folder without {MANIFEST}, not a finished corpus: run `megafish prepare`, or give the prefix "
            "of a .bin/.idx pair"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}): prepare the corpus again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: not the manifest of a corpus (no format {FORMAT!r})")
    if manifest.get("version") != VERSION:
        raise InputError(f"{path}: version {manifest.get('version')!r}, this program reads version {VERSION}")
    missing = [key for key in ("splits", "tokenizer") if not isinstance(manifest.get(key), dict)]
    if missing:
        raise InputError(f"{path}: no {' and no '.join(missing)}: damaged, prepare the corpus again")
    _check(path, "tokenizer", manifest["tokenizer"], _TOKENIZER)
    for split, entry in manifest["splits"].items():
        _check(path, f"splits.{split}", entry, _SPLIT)
        for name, file in entry["files"].items():
            _check(path, f"splits.{split}.files.{name}", file, _FILE)
    return manifest


_TOKENIZER = {"file": str, "sha256": str, "vocab_size": int, "eos_id": int}
_SPLIT = {"tokens": int, "documents": int, "bytes": int, "files": dict}
_FILE = {"bytes": int, "sha256": str}


def _check(path: Path, where: str, entry: Any, kinds: dict[str, type]) -> None:
    if not isinstance(entry, dict):
        raise InputError(f"{path}: {where} is not an object: damaged, prepare the corpus again")
    for key, kind in kinds.items():
        if not isinstance(entry.get(key), kind):
            found = f"is {entry[key]!r}" if key in entry else "is missing"
            raise InputError(f"{path}: {where}.{key} {found}: damaged, prepare the corpus again")
