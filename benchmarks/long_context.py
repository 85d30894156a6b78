"""Decoding behind long contexts: no speculation, fixed settings, and `auto`, in turns.

    python benchmarks/long_context.py --json benchmarks/cpu/long_context.json
    python benchmarks/long_context.py --contexts 1024 8000 --batches 1 8 --repeats 5 --model ./my-model

Every request reads a text of its own (made of what ships with Paceline) and answers a question about it, greedily, with
`--new` tokens. Prompts are computed once for each setting and found in its prefix cache afterwards, so that what is
timed is decoding. The best fixed setting is chosen on the first half of the repeats; all ratios are of the second. The
texts of all settings are compared with those of `none`. There are twelve questions: with more than twelve answers of a
cell (batch x repeats) they come again, and `auto` knows them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from paceline import LLM, SamplingParams
from paceline.bench.host import host_info
from paceline.bench.systems.long_prompts import PASSAGES, long_prompts
from paceline.draft.magicdec import MagicDecDrafter
from paceline.engine.request import Request
from paceline.model.loader import LoadedModel, load_model
from paceline.outputs import Generation

FIXED = ("ngram:k=4", "magicdec:k=3,budget=256", "magicdec:k=4,budget=512")
SETTINGS = ("none", *FIXED, "auto")
_BESIDE = 512
"""Tokens of a prompt beside its text, and of its answer."""


@dataclass
class Cell:
    """One context length and batch."""

    context: int
    batch: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Per repeat, by setting."""
    same_text: dict[str, bool] = field(default_factory=dict)
    accepted_length: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, int] = field(default_factory=dict)
    """Accepted tokens of `auto`, by drafter."""
    views: dict[str, dict[str, float]] = field(default_factory=dict)
    """What `auto` learnt of each view of the context."""

    def ratios(self) -> dict[str, float]:
        """Speed over that of `none` in the same repeat, median of the later half; the best fixed one by name."""
        half = len(self.seconds["none"]) // 2
        early = {name: median(self.seconds[name][:half] or self.seconds[name]) for name in FIXED}
        best = min(early, key=lambda name: early[name])

        def later(name: str, base: str) -> float:
            return median(b / a for a, b in zip(self.seconds[name][half:], self.seconds[base][half:], strict=True))

        found = {name: later(name, "none") for name in SETTINGS[1:]}
        return found | {f"auto over {best}": later("auto", best)}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8000 - _BESIDE])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    loaded = load_model(args.model, dtype=args.dtype)
    cells = [Cell(context, batch) for context in args.contexts for batch in args.batches]
    print(
        f"{'context':>7} {'batch':>5}  " + "  ".join(f"{name:>24}" for name in SETTINGS[1:]) + "  auto over best fixed"
    )
    for cell in cells:
        measure(cell, loaded, args)
        ratios = cell.ratios()
        shown = "  ".join(f"{value:24.2f}" for name, value in ratios.items() if " over " not in name)
        best, value = next((n, v) for n, v in ratios.items() if " over " in n)
        print(f"{cell.context:7d} {cell.batch:5d}  {shown}  {value:.2f} ({best})", flush=True)
        if args.json:
            write(args.json, cells, loaded, args)


def measure(cell: Cell, loaded: LoadedModel, args: argparse.Namespace) -> None:
    """All settings in turns, after one round that computes the prompts and lets `auto` learn."""
    room = cell.context + _BESIDE
    llms = {name: make(loaded, name, room, cell.batch, args.threads) for name in SETTINGS}
    params = SamplingParams(temperature=0.0, max_tokens=args.new, ignore_eos=True)
    for repeat in range(args.repeats + 1):
        prompts, expected = texts(llms["none"], cell, repeat), list[Any]()
        for name, llm in llms.items():
            print(
                f"\r{cell.context} x {cell.batch}: round {repeat} of {args.repeats}, {name:30}", end="", file=sys.stderr
            )
            if not repeat:
                llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1))
            started = time.perf_counter()
            made = llm.generate(prompts, params)
            if repeat:
                cell.seconds.setdefault(name, []).append(time.perf_counter() - started)
            note(cell, name, made)
            found = [g.token_ids for g in made]
            expected = expected or found
            cell.same_text[name] = cell.same_text.get(name, True) and found == expected
    own = llms["auto"].engine.stages.drafting.drafters.get("magicdec")
    if isinstance(own, MagicDecDrafter):
        cell.views = own.report(Request("who asks", [0], 1, params, 0))
    for llm in llms.values():
        llm.close()


def make(loaded: LoadedModel, name: str, room: int, batch: int, threads: int | None) -> LLM:
    """An engine that holds the whole batch."""
    layers, heads = loaded.config.num_hidden_layers, loaded.config.num_key_value_heads
    size = loaded.config.hidden_size // loaded.config.num_attention_heads
    itemsize = 4 if loaded.device.type == "cpu" else loaded.dtype.itemsize
    kv = 2 * layers * heads * size * itemsize * (room + 64) * batch
    longest = min(room, loaded.max_model_len)
    return LLM(
        loaded,
        speculation=name,
        max_model_len=longest,
        kv_cache_memory=kv,
        max_num_seqs=batch,
        num_threads=threads,
    )


def texts(llm: LLM, cell: Cell, repeat: int) -> list[list[int]]:
    """A prompt for each request. No two requests of a batch share blocks; what is asked changes from repeat to repeat,
    so that no drafter knows the answer from the one before."""
    asked = long_prompts(llm, cell.context, len(PASSAGES))
    start = llm.tokenizer.encode("Text number ")
    first = repeat * cell.batch
    return [[*start, *llm.tokenizer.encode(str(i)), *asked[(first + i) % len(asked)]] for i in range(cell.batch)]


def note(cell: Cell, name: str, made: Sequence[Generation]) -> None:
    """What was accepted, and whose."""
    tokens, forwards = sum(len(g.token_ids) for g in made), sum(g.stats.target_forwards for g in made)
    cell.accepted_length[name] = round(tokens / forwards, 3)
    if name == "auto":
        for g in made:
            for drafter, count in g.stats.accepted_by.items():
                cell.chosen[drafter] = cell.chosen.get(drafter, 0) + count


def write(path: Path, cells: Sequence[Cell], loaded: LoadedModel, args: argparse.Namespace) -> None:
    """The finished cells."""
    rows = [asdict(c) | {"ratios": c.ratios()} for c in cells if c.seconds]
    about = {"host": host_info(loaded.precision, loaded.device), "model": args.model, "new_tokens": args.new}
    path.write_text(json.dumps(about | {"cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
