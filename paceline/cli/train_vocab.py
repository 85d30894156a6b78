"""`paceline train vocab`: the most frequent tokens, for a draft head over a part of the vocabulary."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from paceline.cli import options
from paceline.cli.numbers import amount

EPILOG = """\
examples:
  paceline train vocab smollm2-135m runs/four/text --size 8192 --out vocab.npy
  paceline train vocab smollm2-135m corpus.txt more.txt --size 16k --out vocab.json

Sources are text files, or folders of training text that `paceline train draft` wrote (the target's answers count).
The list is ranked, most frequent first; tokens that end a text are always in it. .npy holds the ids alone, .json also
how much of the text they cover.
"""


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = kinds.add_parser(
        "vocab",
        prog="paceline train vocab",
        help="rank tokens by frequency",
        description="Rank a model's tokens by how often they occur in text.",
        usage="paceline train vocab MODEL SOURCE [SOURCE ...] --size N --out FILE.npy|FILE.json",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file, hub id or built-in name (smollm2-135m)")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="text file, or folder of training text")
    parser.add_argument("--size", type=amount, required=True, metavar="N", help="tokens to keep, such as 8192 or 8k")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the list (.npy or .json)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from paceline.model.draft_weights import fingerprint
    from paceline.model.loader import load_model
    from paceline.train import vocab

    path = Path(args.out)
    vocab.check_name(path)
    options.check_writable(args.out, "--out")
    console = options.stderr_console()
    with options.status(console, "starting"):
        target = load_model(args.model, device="cpu")
    columns = (TextColumn("counting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    sources = [Path(source) for source in args.sources]
    vocab_size = int(target.config.vocab_size)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("counting", total=None)
        counts = vocab.count_tokens(
            sources, target.tokenizer, vocab_size, lambda done, total: bar.update(task, completed=done, total=total)
        )
    ids = vocab.rank(counts, args.size, target.eos_token_ids)
    about = {"target": {"name": target.name, **fingerprint(target)}}
    coverage = vocab.save_ranking(path, ids, counts, about)
    line = f"{path}: {len(ids)} of {vocab_size} tokens cover {coverage:.2%} of {int(counts.sum()):,}"
    options.stdout_console().print(line, highlight=False, soft_wrap=True)
    return 0
