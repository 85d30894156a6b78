"""`paceline train draft`: a small draft model of any target, from text the target writes."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.numbers import amount, count, list_of, not_negative, positive, whole
from paceline.errors import ConfigError
from paceline.train.run_folder import check_run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.train.distil import Measurement
    from paceline.train.draft import DraftSettings, Events

EPILOG = """\
examples:
  paceline train draft smollm2-135m --out runs/four
  paceline train draft smollm2-135m --out runs/four --layers 0,9,19,29 --tokens 5M --seconds 240     on a GPU
  paceline train draft smollm2-135m --out runs/try --tokens 20k --steps 20 --batch 16 --batch-tokens 1024
  paceline train draft org/model --out runs/own --prompts questions.jsonl --tokens 2M
  paceline train draft smollm2-135m --out runs/six --text runs/four/text --layers 6 --seconds 60
  paceline train draft smollm2-135m --out runs/wide --text runs/four/text --layers 6 --intermediate 6320 --seconds 60

then: paceline chat smollm2-135m --speculation draft:model=runs/four/draft

The target writes its own training text (RUN/text), some of its layers become the student, the student learns the
target's next-token laws, and RUN/draft is the result: its own layers only, embedding and head stay the target's.
Interrupted (Ctrl-C, or killed), the same command goes on where it stopped: written text is kept, and training
resumes from its last checkpoint.
A prompt file is JSONL with "prompt" or "turns" on each line, or one plain-text prompt a line.
"""


def register(kinds: Any) -> None:
    """Add the kind."""
    parser = kinds.add_parser(
        "draft",
        prog="paceline train draft",
        help="a layer-dropped, distilled draft model",
        description="Train a small draft model of a target: some of its layers, distilled on text the target writes.",
        usage="paceline train draft MODEL --out RUN [options]",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file, hub id or built-in name (smollm2-135m)")
    parser.add_argument("--out", metavar="RUN", required=True, help="folder of the run; the draft will be RUN/draft")
    parser.add_argument("--restart", action="store_true", help="train anew, on the text that is there")
    _add_text(parser.add_argument_group("training text"))
    _add_student(parser.add_argument_group("student"))
    _add_training(parser.add_argument_group("training"))
    parser.set_defaults(run=run)


def _add_text(group: Any) -> None:
    group.add_argument("--tokens", type=amount, metavar="N", help="text to write, such as 200k or 5M (default: 1M)")
    group.add_argument("--text", metavar="DIR", help="use the text in this folder (default: RUN/text)")
    group.add_argument("--prompts", metavar="FILE", help="prompts to answer (default: the target writes them too)")
    group.add_argument("--length", type=count, default=512, metavar="N", help="longest document (default: 512)")
    group.add_argument("--turns", type=count, default=2, metavar="N", help="exchanges in a written chat (default: 2)")
    group.add_argument(
        "--temperatures",
        type=list_of(not_negative),
        default=(0.0, 1.0),
        metavar="T,T",
        help="answers are written at these in turn (default: 0,1)",
    )
    group.add_argument("--batch", type=count, metavar="N", help="documents at once (default: 512; 16 on a CPU)")


def _add_student(group: Any) -> None:
    group.add_argument(
        "--layers",
        default="4",
        metavar="N|LIST",
        help="so many layers evenly spread, or just these, as 0,9,19,29 (default: 4)",
    )
    group.add_argument("--intermediate", type=count, metavar="N", help="widen the MLPs to N neurons")


def _add_training(group: Any) -> None:
    group.add_argument("--steps", type=count, metavar="N", help="optimiser steps")
    group.add_argument("--seconds", type=positive, metavar="S", help="time budget of the training (default: 240)")
    group.add_argument("--lr", type=positive, default=1e-3, metavar="X", help="learning rate (default: 0.001)")
    group.add_argument("--batch-tokens", type=count, metavar="N", help="tokens a step (default: 16384; 2048 on a CPU)")
    group.add_argument(
        "--tv-weight", type=not_negative, default=0.0, metavar="X", help="share of total variation in the loss, 0 to 1"
    )
    group.add_argument("--eval-every", type=count, default=100, metavar="N", help="steps (default: 100)")
    group.add_argument("--save-every", type=count, default=500, metavar="N", help="steps (default: 500)")
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="same seed, same draft (default: 0)")
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the target")
    group.add_argument("--num-threads", type=count, metavar="N", help="CPU threads (default: PyTorch's choice)")
    group.add_argument("--compile", action="store_true", help="compile the loss (needs a C compiler on the first run)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.tv_weight > 1:
        raise ConfigError(f"is {args.tv_weight}; give 0 to 1.", field="tv-weight")
    check_run_folder(Path(args.out))
    console = options.stderr_console()
    with options.status(console, "starting"):
        import torch

        from paceline.bench.host import host_info
        from paceline.model.loader import dequantised, load_model
        from paceline.train.draft import train_draft

        if args.num_threads is not None:
            torch.set_num_threads(args.num_threads)
        target = load_model(args.model, dtype=dequantised(args.dtype, args.device), device=args.device)
    settings = _settings(args, on_cpu=target.device.type == "cpu")
    host = host_info(target.precision, target.device)
    hardware = f"{host['device']}, {host['dtype']}, torch {torch.__version__}"
    with _events(console) as events:
        folder = train_draft(
            target,
            Path(args.out),
            settings,
            text=Path(args.text) if args.text else None,
            command=_command(sys.argv[1:]),
            hardware=hardware,
            restart=args.restart,
            events=events,
        )
    out = options.stdout_console()
    out.print(f"Draft: {folder}", highlight=False, soft_wrap=True)
    hint = f"paceline generate {args.model} --speculation draft:model={folder} ..."
    out.print(f"Use it: {hint}", highlight=False, soft_wrap=True, style="dim")
    return 0


def _command(words: Sequence[str]) -> str:
    """The command line for the record, without this machine's folders."""
    return shlex.join(["paceline", *(Path(word).name if Path(word).is_absolute() else word for word in words)])


def _settings(args: argparse.Namespace, *, on_cpu: bool) -> DraftSettings:
    from paceline.train.distil import DistilSettings
    from paceline.train.draft import DraftSettings
    from paceline.train.write import WriteSettings

    seconds = 240.0 if args.seconds is None and args.steps is None else args.seconds
    return DraftSettings(
        distil=DistilSettings(
            steps=args.steps,
            seconds=seconds,
            batch_tokens=args.batch_tokens or (2048 if on_cpu else 16384),
            learning_rate=args.lr,
            tv_weight=args.tv_weight,
            chunk_rows=512 if on_cpu else 4096,
            heldout_tokens=8192 if on_cpu else 65536,
            seed=args.seed,
            compile=args.compile,
        ),
        write=WriteSettings(
            length=args.length,
            batch=args.batch or (16 if on_cpu else 512),
            temperatures=args.temperatures,
            turns=args.turns,
            prompts=args.prompts,
            seed=args.seed,
        ),
        # Text that is given by its folder is used as it is, unless more is asked for.
        tokens=args.tokens or (None if args.text else 1_000_000),
        layers=args.layers,
        intermediate=args.intermediate,
        eval_every=args.eval_every,
        save_every=args.save_every,
    )


@contextlib.contextmanager
def _events(console: Console) -> Iterator[Events]:
    """A bar per stage, and a line per measurement."""
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from paceline.train.draft import Events

    columns = (TextColumn("{task.description:<8}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as bar:

        def say(text: str) -> None:
            console.print(text, highlight=False, soft_wrap=True)

        def progress(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=1.0)
            tenths = int(10 * share) - int(10 * bar.tasks[tasks[stage]].completed)
            bar.update(tasks[stage], completed=share)
            if stage == "write" and tenths > 0 and not console.is_terminal:  # training says enough by itself
                say(f"written: {share:.0%}")

        def measured(m: Measurement, loss: float) -> None:
            say(
                f"step {m.step:>6}  {m.seconds:6.0f} s  loss {loss:.3f}  held out: loss {m.loss:.3f}, "
                f"acceptance {m.acceptance:.3f} (T=1), {m.agreement:.3f} (T=0)"
            )

        yield Events(progress, say, measured)
