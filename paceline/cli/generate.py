"""`paceline generate`: answer one prompt or a file of prompts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.config import SamplingParams
from paceline.errors import InputError, PacelineError, SamplingParamsError

if TYPE_CHECKING:
    from paceline.llm import LLM
    from paceline.outputs import Completion, Generation

BATCH = 256
"""Prompts given to the engine at once: many times what it runs at once, and what an interruption may lose."""

EPILOG = """\
examples:
  paceline generate smollm2-135m --prompt "Once upon a time" --max-tokens 64 --seed 1
  paceline generate smollm2-135m --chat --prompt "Name three rivers." --temperature 0 --json
  paceline generate smollm2-135m --prompt-file prompts.jsonl --n 2 --json answers.json
  paceline generate smollm2-135m - --speculation ngram:k=4+recycling:k=16 < prompt.txt

Each line of a prompt file is an object with "prompt" (text) or "messages" (a chat); other keys are sampling
options of that line, such as "max_tokens" or "prediction".

--json writes {"model", "prompt_tokens", "token_ids", "text", "finish_reason", "seed", "stats"}. With several
prompts or --n above 1 these objects stand in a list under "outputs", in the order of the prompts, N to each.
"""


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt (text or chat messages) with its sampling options."""

    prompt: str | list[dict[str, Any]]
    params: SamplingParams
    where: str = ""
    """Its line in the prompt file."""


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "generate",
        help="answer a prompt or a file of prompts",
        description="Answer one prompt, streaming to the terminal, or a file of prompts as one batch.",
        usage="paceline generate MODEL (--prompt TEXT | --prompt-file FILE | -) [options]",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file, hub id or built-in name (smollm2-135m)")
    source = parser.add_argument_group("prompt (exactly one)")
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", metavar="FILE", help="JSON lines, see below")
    source.add_argument("stdin", nargs="?", choices=("-",), metavar="-", help="the prompt is read from stdin")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    options.add_sampling_options(parser)
    more = parser.add_argument_group("output")
    default = SamplingParams()
    more.add_argument("--n", type=int, default=default.n, metavar="N", help="samples per prompt (default: %(default)s)")
    more.add_argument("--logprobs", type=int, metavar="K", help="report log-probabilities and the K likeliest tokens")
    more.add_argument("--prediction", metavar="TEXT", help="text expected in the answer: a free draft")
    options.add_json_option(more, "write the results as JSON to FILE, or to stdout")
    options.add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    engine = options.engine_options(args)
    options.check_writable(args.json, "--json")
    if args.logprobs is not None and args.json is None:
        raise InputError("are reported in JSON only.", field="--logprobs", fix="Add --json - or --json FILE.")
    items = read_items(args, options.sampling_params(args))
    console = options.stderr_console()
    with options.open_llm(args.model, engine, console) as llm:
        if args.prompt_file is None and args.n == 1 and args.json is None:
            return _stream(llm, items[0])
        done: list[Generation] = []
        several = len(items) > 1 or items[0].params.n > 1
        check(llm, items)
        try:
            with options.status(console, "answering") as say:
                for start in range(0, len(items), BATCH):
                    say(f"{start} of {len(items)} prompts answered")
                    done += answer(llm, items[start : start + BATCH])
        except (KeyboardInterrupt, PacelineError):
            print(f"{len(done)} of {len(items)} prompts were finished and are kept.", file=sys.stderr)
            if done:
                _emit(args, llm.model_name, done, several=several)
            raise
        return _emit(args, llm.model_name, done, several=several)


def read_items(args: argparse.Namespace, params: SamplingParams) -> list[Item]:
    """The prompts of the command line.

    Raises:
        InputError: not exactly one source, or a bad line in the file.
    """
    if sum(source is not None for source in (args.prompt, args.prompt_file, args.stdin)) != 1:
        raise InputError("give exactly one of --prompt TEXT, --prompt-file FILE and - (stdin).", field="prompt")
    if args.prompt_file is not None:
        items = [
            _item_of_line(line, params, args.chat, f"line {number} of {args.prompt_file}")
            for number, line in options.read_jsonl(args.prompt_file, "--prompt-file")
        ]
        if not items:
            raise InputError(f"{args.prompt_file} holds no prompt.", field="--prompt-file")
        return items
    text = sys.stdin.read() if args.prompt is None else args.prompt
    if not text:
        raise InputError("is empty.", field="prompt")
    return [Item(_as_chat(text) if args.chat else text, params)]


def _item_of_line(line: dict[str, Any], params: SamplingParams, chat: bool, where: str) -> Item:
    rest = dict(line)
    prompt, messages = rest.pop("prompt", None), rest.pop("messages", None)
    if (prompt is None) == (messages is None):
        raise InputError(f'{where} needs either "prompt" or "messages".', field="--prompt-file")
    if messages is None and not (isinstance(prompt, str) and prompt):
        raise InputError(f'{where}: "prompt" must be a text that is not empty.', field="--prompt-file")
    if prompt is None and not _is_chat(messages):
        raise InputError(f'{where}: "messages" must be a list of objects with "role" and "content".')
    try:
        own = options.with_overrides(params, rest)
    except SamplingParamsError as error:
        raise InputError(f"{where}: {error}", field="--prompt-file") from error
    return Item(_as_chat(str(prompt)) if chat and messages is None else messages or str(prompt), own, where)


def _as_chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def check(llm: LLM, items: Sequence[Item]) -> None:
    """Refuse what cannot run before anything is generated.

    Raises:
        InputError: names the item.
    """
    for item in items:
        try:
            llm.check(item.prompt, item.params)
        except InputError as error:
            raise InputError(f"{item.where}: {error}" if item.where else str(error)) from error


def answer(llm: LLM, items: Sequence[Item]) -> list[Generation]:
    """Answer all items, plain prompts and chats each as one batch, in the order given."""
    results: dict[int, Generation] = {}
    chats = [i for i, item in enumerate(items) if isinstance(item.prompt, list)]
    plain = [i for i, item in enumerate(items) if isinstance(item.prompt, str)]
    for positions, call in ((plain, llm.generate), (chats, llm.chat)):
        if positions:
            prompts: Any = [items[i].prompt for i in positions]
            answers = call(prompts, [items[i].params for i in positions])
            results |= dict(zip(positions, answers, strict=True))
    return [results[i] for i in range(len(items))]


def to_json(model: str, generations: Sequence[Generation], *, several: bool) -> dict[str, Any]:
    """The JSON form of the results."""
    entries = [
        {"model": model, **_entry(generation, output), "prompt_index": number, "index": output.index}
        for number, generation in enumerate(generations)
        for output in generation.outputs
    ]
    return {"model": model, "outputs": entries} if several else _only(entries[0])


def _only(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("prompt_index", "index")}


def _entry(generation: Generation, output: Completion) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "prompt_tokens": len(generation.prompt_token_ids),
        "token_ids": list(output.token_ids),
        "text": output.text,
        "finish_reason": output.finish_reason,
        "seed": output.seed,
        "stats": dataclasses.asdict(output.stats),
    }
    if output.logprobs is not None:
        entry["logprobs"] = [dataclasses.asdict(item) for item in output.logprobs]
    if output.error is not None:
        entry["error"] = output.error
    return entry


def _emit(args: argparse.Namespace, model: str, generations: Sequence[Generation], *, several: bool) -> int:
    """Write the results; 1 if a request failed."""
    if args.json is not None:
        options.write_json(to_json(model, generations, several=several), args.json)
    failed = 0
    for number, generation in enumerate(generations, start=1):
        for output in generation.outputs:
            name = f"prompt {number}" + (f", sample {output.index + 1}" if len(generation.outputs) > 1 else "")
            if output.error is not None:
                failed += 1
                print(f"error: {name}: {output.error}", file=sys.stderr)
            elif args.json is None:
                print(f"--- {name}\n{output.text}")
    return 1 if failed else 0


def _stream(llm: LLM, item: Item) -> int:
    """Write one answer as it comes."""
    last = None
    try:
        for last in llm.stream(item.prompt, item.params):
            sys.stdout.write(last.text)
            sys.stdout.flush()
    finally:
        if last is not None:
            sys.stdout.write("\n")
    output = last.generation.outputs[0] if last is not None and last.generation is not None else None
    if output is not None and output.error is not None:
        print(f"error: {output.error}", file=sys.stderr)
        return 1
    return 0
