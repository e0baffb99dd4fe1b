"""The command `megafish filter`. Imports what it runs when it runs, like megafish/cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megafish.errors import InputError


def filter_(
    corpora: Annotated[list[Path], typer.Argument(help="Corpus folders, or prefixes of .bin/.idx pairs")],
    to: Annotated[Path, typer.Option(help="File to write")],
    n: Annotated[int, typer.Option("--n", help="Tokens of an n-gram: none so long is ever emitted", min=2)] = 10,
    false_positive_rate: Annotated[
        float, typer.Option(help="Share of other n-grams that are blocked by chance", min=0, max=1)
    ] = 0.01,
    minimum_count: Annotated[int, typer.Option(help="Only n-grams that occur at least so often", min=1)] = 1,
    beginnings: Annotated[
        bool, typer.Option(help="Hold the n-grams' beginnings too: decoding is faster, the file twice as large")
    ] = True,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer of .bin/.idx pairs (corpus folders have their own)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the hash functions", min=0)] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one a core)", min=1)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists")] = False,
) -> None:
    """Build a filter of a corpus's n-grams, for generation that never emits one (MemFree decoding)."""
    if to.exists() and not overwrite:
        raise InputError(f"{to}: exists already: give --overwrite to replace it, or another --to")

    from megafish.data.tokenizer import load_tokenizer
    from megafish.decode.build_filter import build_filter
    from megafish.decode.ngram_filter import theory
    from megafish.progress import format_quantity

    built = build_filter(
        corpora,
        to,
        n=n,
        false_positive_rate=false_positive_rate,
        minimum_count=minimum_count,
        beginnings=beginnings,
        seed=seed,
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        workers=workers,
    )
    header = built.header
    counts = [header["ngrams"], *([header["beginnings"]["ngrams"]] if beginnings else [])]
    size, least = to.stat().st_size, sum(theory(count, false_positive_rate)[0] for count in counts) / 8
    print(
        f"{to}: {header['ngrams']:,} {n}-grams"
        + (f" and {counts[1]:,} beginnings" if beginnings else "")
        + f", {header['hashes']} hash functions, {format_quantity(size, 'B')} ({size / least - 1:+.1%} beside theory)"
    )
    print(f"next: megafish generate RUN --memfree {to} --prompt TEXT")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("filter", epilog="Example: megafish filter corpus --to corpus.ngrams --n 10")(filter_)
