"""The command `megafish duplicates`. Imports what it runs when it runs, like megafish/cli.py."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

_SHOWN = 48
"""Characters of a passage in the table."""


class Split(str, Enum):
    """Of a corpus folder."""

    train = "train"
    valid = "valid"


def duplicates(
    corpus: Annotated[Path, typer.Argument(help="Corpus folder, or the prefix of a .bin/.idx pair")],
    length: Annotated[int, typer.Option(help="Tokens of a passage", min=2)] = 50,
    top: Annotated[int, typer.Option(help="Passages to list", min=0)] = 20,
    split: Annotated[Split, typer.Option(help="Split of a corpus folder")] = Split.train,
    index: Annotated[Path | None, typer.Option(help="Folder of the suffix array (default: beside the tokens)")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file")] = None,
) -> None:
    """Say what a corpus repeats, and how often."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from megafish.data.corpus import Corpus
    from megafish.data.duplicates import Duplicates, bin_bounds
    from megafish.errors import InputError
    from megafish.run import write_atomic

    tokenizer = Corpus(corpus, split.value).open_tokenizer()
    found = Duplicates.of(corpus, split.value, index)
    totals = found.histogram(length)
    if not totals:
        raise InputError(f"{corpus}: no document has {length} tokens: give a smaller --length")
    passages = found.most_repeated(length, top)
    texts = [found.data.tokens[p.start : p.start + p.length].tolist() for p in passages]
    table = Table(
        title=f"{corpus}: most repeated passages of at least {length} tokens", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for heading in ("times", "tokens", "document", "text"):
        table.add_column(heading, justify="left" if heading == "text" else "right", no_wrap=True)
    rows: list[dict[str, Any]] = []
    for passage, ids in zip(passages, texts, strict=True):
        text = tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))
        table.add_row(str(passage.count), str(passage.length), str(passage.document), _shown(text))
        rows.append({"count": passage.count, "tokens": ids, "document": passage.document, "text": text})
    console = Console()
    if rows:
        console.print(table)
    places = sum(occurrences for _, occurrences in totals.values())
    for least in (2, 10, 100):
        share = sum(o for number, (_, o) in totals.items() if bin_bounds(number)[0] >= least) / places
        console.print(
            f"of the text in passages of {length} tokens that occur at least {least} times: {share:.2%}",
            highlight=False,
        )
    if output is not None:
        bins = [
            {"least": bin_bounds(number)[0], "most": bin_bounds(number)[1], "distinct": distinct, "occurrences": every}
            for number, (distinct, every) in totals.items()
        ]
        write_atomic(output, json.dumps({"length": length, "bins": bins, "passages": rows}, ensure_ascii=False) + "\n")
        print(f"written to {output}")
    print(f"next: megafish audit RUN audit.probes={corpus} audit.probe_choice=duplicates")


def _shown(text: str) -> str:
    """As much of a text as a line of a terminal holds."""
    plain = ascii(text)[1:-1]
    return plain if len(plain) <= _SHOWN else f"{plain[: _SHOWN - 3]}..."


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: megafish duplicates corpus --length 50 --top 10")(duplicates)
