"""`paceline chat`: talk with a model in the terminal.

Also home of the streaming printer that colours accepted draft tokens, which `demo` uses too.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.config import SamplingParams
from paceline.errors import RequestError

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console

    from paceline.llm import LLM
    from paceline.outputs import Generation, StreamChunk

HELP = "/reset forgets the conversation · /stats shows speeds · /quit leaves · Ctrl-C stops an answer"

_STYLES = {
    "ngram": "green",
    "recycling": "cyan",
    "suffix": "blue",
    "draft": "magenta",
    "ouroboros": "bright_magenta",
    "rapid": "bright_cyan",
    "magicdec": "bright_green",
    "layerskip": "bright_yellow",
    "s3d": "red",
    "easyspec": "bright_red",
    "prediction": "yellow",
    "grammar": "bright_black",
}
_OTHER_STYLE = "bright_blue"
"""Of a drafter that has no colour of its own."""

EPILOG = """\
examples:
  paceline chat smollm2-135m
  paceline chat smollm2-135m --system "Answer in one sentence." --temperature 0
  paceline chat smollm2-135m --speculation ngram:k=4+recycling:k=16

In the conversation:
  /reset    forget everything said so far
  /stats    tokens per second and accepted draft tokens, last answer and all
  /quit     leave (also Ctrl-D)
  Ctrl-C    stop the answer; what came so far stays in the conversation
"""


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model. Accepted draft tokens are coloured by the drafter that guessed them.",
        usage="paceline chat MODEL [options]",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file, hub id or built-in name (smollm2-135m)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--prediction", metavar="TEXT", help="text expected in the answers: a free draft")
    options.add_sampling_options(parser)
    options.add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    engine = options.engine_options(args)
    params = options.sampling_params(args)
    console = options.stdout_console()
    with options.open_llm(args.model, engine, options.stderr_console()) as llm:
        conversation = Conversation(llm, params, console, system=args.system)
        if sys.stdin.isatty():
            console.print(f"{llm.model_name}. {HELP}", style="dim")
            console.print(legend(llm.config.speculation), end="\n\n")
        for line in _lines():
            if not conversation.handle(line):
                break
    return 0


@dataclass
class Conversation:
    """The messages so far and what they cost."""

    llm: LLM
    params: SamplingParams
    console: Console
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    finished: list[Generation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was said, not what it cost."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def handle(self, line: str) -> bool:
        """Act on one line of input; False means leave."""
        text = line.strip()
        if text == "/quit":
            return False
        if text == "/reset":
            self.reset()
            self.console.print("Forgotten.", style="dim")
        elif text == "/stats":
            self.console.print(self.stats(), style="dim")
        elif text.startswith("/"):
            self.console.print(HELP, style="dim")
        elif text:
            self.ask(text)
        return True

    def ask(self, text: str) -> None:
        """Stream the answer to one message; a message that cannot be answered leaves no trace."""
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            chunks: Any = self.llm.stream(list(self.messages), self.params)
            with stop_on_interrupt() as interrupted, contextlib.closing(chunks):
                for chunk in chunks:
                    print_chunk(self.console, chunk)
                    answer += chunk.text
                    if chunk.generation is not None:
                        self.finished.append(chunk.generation)
                    if interrupted:
                        break
        except RequestError as error:
            self.messages.pop()
            self.console.print(f"error: {error}", style="red")
            self.console.print("/reset starts a new conversation.", style="dim")
            return
        self.console.print("" if not interrupted else "\n(stopped)", style="dim")
        self.messages.append({"role": "assistant", "content": answer})

    def stats(self) -> str:
        """What the last answer and all finished answers cost."""
        if not self.finished:
            return "No answer yet."
        last = self.finished[-1].stats
        tokens = sum(len(g.token_ids) for g in self.finished)
        forwards = sum(g.stats.target_forwards for g in self.finished)
        guessed = ", ".join(f"{name} {count}" for name, count in sorted(last.accepted_by.items())) or "none"
        return (
            f"last answer: {last.tokens_per_second:.1f} tokens/s, first after {last.ttft_seconds:.2f} s, "
            f"mean accepted length {last.mean_accepted_length:.2f}, accepted draft tokens: {guessed}\n"
            f"all {len(self.finished)}: {tokens} tokens in {forwards} target forwards"
        )


def drafter_style(name: str) -> str:
    """Colour of the accepted draft tokens that a drafter guessed."""
    return _STYLES.get(name, _OTHER_STYLE)


def print_chunk(console: Console, chunk: StreamChunk) -> None:
    """Print new text, each accepted draft token in the colour of its drafter."""
    from rich.text import Text

    text = Text()
    for piece, drafter in zip(chunk.pieces, chunk.drafters, strict=True):
        text.append(piece, style=drafter_style(drafter) if drafter else "")
    console.print(text, end="", soft_wrap=True)
    console.file.flush()


def legend(speculation: str) -> Any:
    """One line that names the colours of a speculation setting's drafters."""
    from rich.text import Text

    from paceline.plan.spec import parse_speculation

    drafters = parse_speculation(speculation).drafters
    if not drafters:
        return Text("no speculation")
    text = Text("accepted draft tokens by drafter:")
    for drafter in drafters:
        text.append(" ").append(drafter.name, style=drafter_style(drafter.name))
    return text.append("; the rest is the target model's own choice")


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """Let Ctrl-C fill the list instead of raising, so that no engine step is cut in half.

    A second Ctrl-C raises.
    """
    interrupted: list[bool] = []

    def note(_signum: int, _frame: FrameType | None) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """Lines typed by the user (or piped in) until end of input."""
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing and history)
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            print("\n(/quit leaves)")
        except EOFError:
            return
