"""`paceline train acceptance-head`: a small network that says when a draft model should stop."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.numbers import amount, count, not_negative, positive, whole
from paceline.train.run_folder import check_run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.train.acceptance_head import Events, HeadSettings

EPILOG = """\
examples:
  paceline train acceptance-head smollm2-135m --draft builtin --out runs/head --tokens 60k --length 256
  paceline train acceptance-head smollm2-135m --draft runs/four/draft --out runs/head --text runs/four/text
  paceline train acceptance-head smollm2-135m --draft builtin --out runs/decision --kind decision --text runs/head/text

then: paceline chat smollm2-135m --speculation "draft:model=builtin,max=20@specdec++:head=runs/head/head"
 and: paceline chat smollm2-135m --speculation "draft:model=builtin,max=20@decision:head=runs/decision/head"

The target writes text (RUN/text), the draft draws a token at every place of its answers, the target says how likely it
accepts each (RUN/labels), and the head learns to tell them apart; the draft is not changed. Interrupted, the same
command goes on where it stopped.
"""


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = kinds.add_parser(
        "acceptance-head",
        prog="paceline train acceptance-head",
        help="a head that says when a draft model should stop",
        description="Train a head that judges a draft model's tokens, for the policies specdec++ and decision.",
        usage="paceline train acceptance-head MODEL --draft DRAFT --out RUN [options]",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file, hub id or built-in name (smollm2-135m)")
    parser.add_argument("--draft", metavar="DRAFT", required=True, help="its draft model, as in draft:model=DRAFT")
    parser.add_argument("--out", metavar="RUN", required=True, help="folder of the run; the head will be RUN/head")
    parser.add_argument(
        "--kind", choices=("acceptance", "decision"), default="acceptance", help="for specdec++, or for decision"
    )
    parser.add_argument("--restart", action="store_true", help="train anew, on the text that is there")
    text = parser.add_argument_group("training text")
    text.add_argument("--tokens", type=amount, metavar="N", help="text to write, such as 60k (default: 60k)")
    text.add_argument("--text", metavar="DIR", help="use the text in this folder (default: RUN/text)")
    text.add_argument("--prompts", metavar="FILE", help="prompts to answer (default: the target writes them too)")
    text.add_argument("--length", type=count, default=512, metavar="N", help="longest document (default: 512)")
    text.add_argument("--turns", type=count, default=2, metavar="N", help="exchanges in a written chat (default: 2)")
    text.add_argument("--batch", type=count, metavar="N", help="documents at once (default: 512; 16 on a CPU)")
    _add_training(parser.add_argument_group("training"))
    parser.set_defaults(run=run)


def _add_training(group: Any) -> None:
    group.add_argument("--blocks", type=count, default=3, metavar="N", help="residual blocks (default: 3)")
    group.add_argument("--epochs", type=count, default=3, metavar="N", help="default: 3")
    group.add_argument("--lr", type=positive, default=1e-3, metavar="X", help="learning rate (default: 0.001)")
    group.add_argument(
        "--rejection-weight",
        type=positive,
        metavar="X",
        help="what a rejection counts beside an acceptance (default: 6; 1 for decision)",
    )
    group.add_argument(
        "--mixing", type=not_negative, default=0.15, metavar="X", help="share of the target's tokens (default: 0.15)"
    )
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="same seed, same head (default: 0)")
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of both models")
    group.add_argument("--num-threads", type=count, metavar="N", help="CPU threads (default: PyTorch's choice)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_run_folder(Path(args.out))
    console = options.stderr_console()
    with options.status(console, "starting"):
        import torch

        from paceline.bench.host import host_info
        from paceline.model.loader import dequantised, load_model
        from paceline.train.acceptance_head import open_draft, train_acceptance_head

        if args.num_threads is not None:
            torch.set_num_threads(args.num_threads)
        target = load_model(args.model, dtype=dequantised(args.dtype, args.device), device=args.device)
        draft = open_draft(args.draft, target)
    host = host_info(target.precision, target.device)
    with _events(console) as events:
        folder = train_acceptance_head(
            target,
            draft,
            Path(args.out),
            _settings(args, on_cpu=target.device.type == "cpu"),
            text=Path(args.text) if args.text else None,
            command=_command(sys.argv[1:]),
            hardware=f"{host['device']}, {host['dtype']}, torch {torch.__version__}",
            restart=args.restart,
            events=events,
        )
    out = options.stdout_console()
    out.print(f"Head: {folder}", highlight=False, soft_wrap=True)
    policy = "decision" if args.kind == "decision" else "specdec++"
    hint = f'paceline generate {args.model} --speculation "draft:model={args.draft},max=20@{policy}:head={folder}" ...'
    out.print(f"Use it: {hint}", highlight=False, soft_wrap=True, style="dim")
    return 0


def _command(words: Sequence[str]) -> str:
    """The command line for the record, without this machine's folders."""
    return shlex.join(["paceline", *(Path(word).name if Path(word).is_absolute() else word for word in words)])


def _settings(args: argparse.Namespace, *, on_cpu: bool) -> HeadSettings:
    from paceline.train.acceptance_head import HeadSettings
    from paceline.train.write import WriteSettings

    decision = args.kind == "decision"
    return HeadSettings(
        kind=args.kind,
        blocks=args.blocks,
        epochs=args.epochs,
        learning_rate=args.lr,
        rejection_weight=args.rejection_weight or (1.0 if decision else 6.0),
        mixing=args.mixing,
        seed=args.seed,
        # Text that is given by its folder is used as it is, unless more is asked for.
        tokens=args.tokens or (None if args.text else 60_000),
        write=WriteSettings(
            length=args.length,
            batch=args.batch or (16 if on_cpu else 512),
            turns=args.turns,
            prompts=args.prompts,
            seed=args.seed,
        ),
    )


@contextlib.contextmanager
def _events(console: Console) -> Iterator[Events]:
    """A bar per stage, and a line per measurement."""
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from paceline.train.acceptance_head import Events

    columns = (TextColumn("{task.description:<8}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as bar:

        def progress(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=1.0)
            bar.update(tasks[stage], completed=share)

        yield Events(progress, lambda text: console.print(text, highlight=False, soft_wrap=True))
