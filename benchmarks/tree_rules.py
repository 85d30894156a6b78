"""Mean accepted length of tree shapes under the acceptance rules: what it costs that `coupled` keeps the text.

    python benchmarks/tree_rules.py --contexts 256 --json benchmarks/cpu/tree_rules.json
    python benchmarks/tree_rules.py --contexts 5008 --draft builtin --processes 8      a thread each

Under `coupled` the text is the same with and without drafts; `recursive` and `multi` weigh the draft's laws, accept
more of it, and their text depends on it. Every round drafts one tree and walks it, at contexts along the target's own
answers to the questions that come with Paceline. All trees and rules are tried at the same contexts, so differences
are paired; intervals (95%) are a bootstrap over contexts.

The draft model is `--draft`; by default it is the target itself without a few middle layers, which agrees with it
about as often as a trained small one. Only how much is accepted is measured here, never time.

Trees of 30 nodes: `rsd-c` 2/2/2/1 and `rsd-s` of width 6 have five levels both. Under `multi` the siblings of the same
tree, there called `branching`, are drawn independently. `sequoia` first learns its positional vector in rounds of its
own at other contexts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from paceline import LLM, SamplingParams
from paceline.arrays import FloatArray
from paceline.bench.host import host_info
from paceline.bench.spec import builtin_questions, parse_questions
from paceline.bench.tree_rounds import Round, TreeRounds, Trial, Walkers, bootstrap, learn_ranks
from paceline.engine.positional import best_trees, positional
from paceline.model.draft_weights import is_draft, load_draft
from paceline.model.loader import load_model

NODES, DEPTH = 30, 12
BUDGETS = (16, 32, 64)
TREES = ("chain", "k-ary:k=2", "rsd-c:widths=2/2/2/1", "rsd-s:width=6", "sequoia")
REPEATING = "branching:widths=2/2/2/1"
"""The tree of `rsd-c` under `multi`."""
RULES = ("coupled", "recursive", "multi")
GROWING = ("k-ary:k=2", "k-ary:k=3", "sequoia")
_CHAIN = f"chain recursive {NODES}"
"""Beside every budget: no round accepts as many tokens as it has."""
_KV_BYTES = 768 << 20
_MAX_MODEL_LEN = 2048
_ANSWER = 256
"""Tokens of an answer after which the next question is taken."""


def main() -> None:
    """Run and print."""
    args = _arguments()
    about = args.draft or f"{args.model} without layers {args.skip}"
    with tempfile.TemporaryDirectory() as folder:
        args.draft = args.draft or save_without(args.model, args.skip, folder)
        context = multiprocessing.get_context("spawn")
        index = context.Value("i", 0)
        with ProcessPoolExecutor(args.processes, context, _start, (args, index)) as pool:
            host: dict[str, Any] = pool.submit(_host).result()
            print(f"{host}\ntarget {args.model}, draft {about}, {args.contexts} contexts\n", flush=True)
            results: dict[str, Any] = {}
            for temperature in args.temperatures.split(","):
                for result in measure(pool, float(temperature), args):
                    results[temperature] = result
                    if args.json:  # after every few contexts, so that a run may be ended at any time
                        found = {"host": host, "target": args.model, "draft": about, "results": list(results.values())}
                        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
                show(results[temperature])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--draft", help="a draft model: built-in name, folder or hub id")
    parser.add_argument("--skip", default="12-14", help="layers that the draft lacks, without --draft")
    parser.add_argument("--contexts", type=int, default=256, help="per temperature")
    parser.add_argument("--learn", type=int, default=96, help="contexts at which Sequoia's vectors are learned")
    parser.add_argument("--processes", type=int, default=1, help="each with a thread and models of its own (2 GB)")
    parser.add_argument("--together", type=int, default=16, help="contexts of one forward; 32 take 6 GB")
    parser.add_argument("--temperatures", default="1,0.6")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", help="write the result here")
    return parser.parse_args()


def save_without(model: str, skip: str, folder: str) -> str:
    """Save a model that lacks the layers `first-last`."""
    loaded = load_model(model, dtype="float32", device="cpu")
    first, last = map(int, skip.split("-"))
    made = AutoModelForCausalLM.from_pretrained(loaded.path, dtype=torch.float32)
    kept = [layer for i, layer in enumerate(made.model.layers) if not first <= i <= last]
    made.model.layers = torch.nn.ModuleList(kept)
    made.config.num_hidden_layers = len(kept)
    made.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def prompts(llm: LLM) -> list[list[int]]:
    """The questions that come with Paceline, as conversations."""
    lines = builtin_questions().read_text(encoding="utf-8").splitlines()
    questions = parse_questions((i, json.loads(line)) for i, line in enumerate(lines, start=1))
    return [llm.chat_prompt([{"role": "user", "content": question.turns[0]}]) for question in questions]


def trials() -> list[Trial]:
    """All that is tried at every context."""
    found = [
        Trial(tree, rule, NODES, DEPTH)
        for tree, rule in itertools.product(TREES, RULES)
        if rule != "multi" or not tree.startswith(("rsd", "chain"))
    ]
    found.append(Trial(REPEATING, "multi", NODES, DEPTH))
    return found + [Trial(tree, "recursive", nodes, DEPTH) for nodes in BUDGETS for tree in GROWING]


class Worker:
    """Makes rounds in a process of its own, at contexts that no other worker has.

    Args:
        args: as given.
        index: which worker: it begins at another question, with noise of its own.
    """

    def __init__(self, args: argparse.Namespace, index: int) -> None:
        torch.set_num_threads(1)
        self.args, self.index = args, index
        loaded = load_model(args.model, dtype=args.dtype, device="cpu")
        settings = {"speculation": "none", "max_model_len": _MAX_MODEL_LEN, "kv_cache_memory": _KV_BYTES}
        whole = not is_draft(args.draft)
        draft = load_model(args.draft, dtype=args.dtype, device="cpu") if whole else load_draft(args.draft, loaded)
        self.host = host_info(loaded.precision, torch.device("cpu"))
        target = LLM(loaded, **settings)
        self.rounds = TreeRounds(target, LLM(draft, **settings))
        self.questions = prompts(target)
        self.temperature: float | None = None

    def begin(self, temperature: float) -> None:
        """Learn Sequoia's vectors, the same in every worker, and begin at this worker's own questions."""
        self.temperature = temperature
        params = SamplingParams(temperature=temperature, max_tokens=_ANSWER, ignore_eos=True)
        learn = itertools.count(round(temperature * 1000) << 32)
        together = self.args.together
        learners = Walkers(self.rounds, self.questions[1::2], params, together)
        trial = Trial("sequoia", "", max(BUDGETS), DEPTH)
        self.vectors = learn_ranks(self.rounds, learners, RULES, trial, learn, self.args.learn)
        self.seeds = itertools.count((round(temperature * 1000) << 32) + ((self.index + 1) << 24))
        mine = deque(self.questions[::2])
        mine.rotate(-self.index * together)
        self.walkers = Walkers(self.rounds, list(mine), params, together)

    def run(self, temperature: float) -> tuple[Mapping[str, FloatArray], dict[Trial, list[Round]]]:
        """All trials at the next few contexts."""
        if temperature != self.temperature:
            self.begin(temperature)
        found: dict[Trial, list[Round]] = {}
        for trial in trials():
            vector = self.vectors[trial.rule] if trial.tree == "sequoia" else None
            seeds = list(itertools.islice(self.seeds, self.args.together))
            found[trial] = self.rounds.run(self.walkers.requests, trial, seeds, vector)
        self.walkers.move_on(found[trials()[1]])
        return self.vectors, found


_worker: Worker | None = None
"""Of this process."""


def _start(args: argparse.Namespace, index: Any) -> None:
    global _worker
    with index.get_lock():
        mine, index.value = index.value, index.value + 1
    _worker = Worker(args, mine)


def _host() -> dict[str, Any]:
    assert _worker is not None
    return _worker.host


def _run(temperature: float) -> tuple[Mapping[str, FloatArray], dict[Trial, list[Round]]]:
    assert _worker is not None
    return _worker.run(temperature)


def measure(pool: Executor, temperature: float, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All trials at one temperature; what is known so far after every few contexts."""
    found: dict[Trial, list[Round]] = {trial: [] for trial in trials()}
    groups = -(-args.contexts // args.together)
    for done, task in enumerate(as_completed([pool.submit(_run, temperature) for _ in range(groups)]), start=1):
        vectors, made = task.result()
        for trial, rounds in made.items():
            found[trial] += rounds
        print(f"temperature {temperature}: {done * args.together} contexts", flush=True)
        yield summary(temperature, vectors, found)


def summary(
    temperature: float, vectors: Mapping[str, FloatArray], found: Mapping[Trial, Sequence[Round]]
) -> dict[str, Any]:
    """Means, intervals, and differences that matter."""
    lengths = {_name(t): np.array([len(r.walk.tokens) for r in made], dtype=np.float64) for t, made in found.items()}
    drawn = bootstrap(lengths)
    rows = []
    for trial, made in found.items():
        name = _name(trial)
        nodes, accepted = sum(len(r.tree) for r in made), sum(len(r.walk.path) for r in made)
        row = {"trial": name, "rounds": len(made), "length": float(lengths[name].mean())}
        row |= {"interval": _interval(drawn[name]), "accepted_per_drafted": accepted / nodes}
        row |= {"nodes": nodes / len(made), "repeats": sum(r.repeats for r in made) / nodes}
        if trial.tree == "sequoia":
            table = best_trees(positional(vectors[trial.rule]), trial.nodes, trial.depth)
            row["predicted"] = 1.0 + float(table.gain[table.level(trial.depth), trial.nodes])
        rows.append(row)
    pairs = [(f"{t} recursive {NODES}", f"{t} {rule} {NODES}") for t in TREES for rule in ("coupled", "multi")]
    pairs.append((f"rsd-c:widths=2/2/2/1 recursive {NODES}", f"{REPEATING} multi {NODES}"))
    pairs += [(f"rsd-s:width=6 {r} {NODES}", f"rsd-c:widths=2/2/2/1 {r} {NODES}") for r in ("recursive", "coupled")]
    pairs += [(f"sequoia recursive {n}", f"{t} recursive {n}") for t in GROWING[:-1] for n in BUDGETS]
    pairs += [(f"sequoia recursive {n}", _CHAIN) for n in BUDGETS]
    differences = [
        {"of": a, "minus": b, "difference": float((lengths[a] - lengths[b]).mean())}
        | {"interval": _interval(drawn[a] - drawn[b])}
        for a, b in pairs
        if a in lengths and b in lengths
    ]
    ranks = {rule: np.round(vector, 4).tolist() for rule, vector in vectors.items()}
    return {"temperature": temperature, "ranks": ranks, "rows": rows, "differences": differences}


def _name(trial: Trial) -> str:
    return f"{trial.tree} {trial.rule} {trial.nodes}"


def _interval(values: FloatArray) -> list[float]:
    return [round(float(v), 4) for v in np.quantile(values, (0.025, 0.975))]


def show(result: Mapping[str, Any]) -> None:
    """The table."""
    print(f"\ntemperature {result['temperature']}; acceptance by rank:")
    for rule, vector in result["ranks"].items():
        print(f"  {rule:10}", *(f"{v:.3f}" for v in vector[:8]))
    print(
        f"{'tree, rule, nodes':38} {'rounds':>6} {'length':>7} {'95% interval':>15} {'acc/drafted':>11} {'repeats':>8}"
    )
    for row in result["rows"]:
        low, high = row["interval"]
        tail = f"   predicted {row['predicted']:.2f}" if "predicted" in row else ""
        print(
            f"{row['trial']:38} {row['rounds']:6} {row['length']:7.3f} {low:7.3f}-{high:<7.3f}"
            f" {row['accepted_per_drafted']:11.3f} {row['repeats']:8.3f}{tail}"
        )
    for row in result["differences"]:
        low, high = row["interval"]
        print(f"{row['of']} minus {row['minus']}: {row['difference']:+.3f} ({low:+.3f} to {high:+.3f})")


if __name__ == "__main__":
    main()
