"""Real vLLM on a CPU: with Paceline's scheduler, greedy texts in fp32 are those of vLLM without speculation.

Run with the interpreter of an environment that has vLLM: `python -m pytest -m vllm -n 0 tests/in_vllm`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import DownloadError
from paceline.model.source import resolve_source

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed in this environment"),
]
SCHEDULER = "paceline.integrations.vllm.scheduler"
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOPICS = ("a fox", "the sea", "bread", "a bridge", "winter", "music", "a train", "honey")
SHAPES = ("Write about {}.", "List five facts on {}. 1.", "{0} and {0} and {0} and", "Say it again: {}, {}, {},")
PROMPTS = [shape.replace("{0}", topic).replace("{}", topic) for shape in SHAPES for topic in TOPICS]
TOKENS = 32


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as a plain transformers folder."""
    try:
        source = resolve_source(os.environ.get("PACELINE_TEST_MODEL", "smollm2-135m"))
    except DownloadError as error:
        pytest.skip(f"the model cannot be fetched: {error}")
    folder = tmp_path_factory.mktemp("model")
    for path in source.iterdir():
        if path.name not in ("gguf-blocks.safetensors", "paceline.json"):
            (folder / path.name).symlink_to(path)
    return folder


def generate(model: Path, *, spec: dict[str, Any] | None = None, paced: bool = True, **job: Any) -> dict[str, Any]:
    """Texts of a vLLM engine in a process of its own."""
    engine: dict[str, Any] = {"speculative_config": spec, "max_num_seqs": 32, **job.pop("engine", {})}
    if paced:
        engine["scheduler_cls"] = SCHEDULER
    job = {"model": str(model), "jobs": [PROMPTS], "max_tokens": TOKENS, **job, "engine": engine}
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "NUMBA_THREADING_LAYER": "workqueue",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("generate.py")), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert found, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(found[0].removeprefix("RESULT"))
    return result


@pytest.fixture(scope="session")
def plain(model: Path) -> list[dict[str, list[int]]]:
    """Stock vLLM without speculation, at batch 1, 7 and 32."""
    texts: list[dict[str, list[int]]] = generate(model, paced=False, jobs=[PROMPTS[:1], PROMPTS[4:11], PROMPTS])[
        "texts"
    ]
    return texts


def check_paced(about: dict[str, Any], *, base: str, left: int = 0) -> None:
    """Paceline ran, looked ahead, and left nothing behind."""
    assert f"Paced{base}" in about["scheduler"]
    assert about["errors"] == 0
    assert about["left"] == left
    assert about["counts"]["paceline:drafts_verified_total"] > 0
    assert about["counts"]["paceline:drafts_accepted_total"] > 0


METHODS = {
    "ngram": NGRAM,
    "own-suffix": {
        "method": "custom_class",
        "model": "paceline.integrations.vllm.SuffixProposer",
        "num_speculative_tokens": 6,
    },
    "recycling": {
        "method": "custom_class",
        "model": "paceline.integrations.vllm.RecyclingProposer",
        "num_speculative_tokens": 3,
    },
    "suffix": {"method": "suffix", "num_speculative_tokens": 6},
}


@pytest.mark.parametrize("name", METHODS)
def test_texts_are_those_of_plain_decoding(name: str, model: Path, plain: list[dict[str, list[int]]]) -> None:
    if name == "suffix" and find_spec("arctic_inference") is None:
        pytest.skip("vLLM's suffix method needs arctic-inference, which is not installed")
    made = generate(model, spec=METHODS[name], jobs=[PROMPTS[:1], PROMPTS[4:11], PROMPTS])
    assert made["texts"] == plain
    check_paced(made["about"], base="Scheduler")
    assert made["about"]["warm"]


def test_draft_model(model: Path, plain: list[dict[str, list[int]]]) -> None:
    """The draft is the model itself, so all of it is right. (vLLM has no async scheduling on a CPU.)"""
    spec = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
    made = generate(model, spec=spec, jobs=[PROMPTS[4:11]])
    assert made["texts"] == plain[1:2]
    check_paced(made["about"], base="Scheduler")


@pytest.mark.filterwarnings("ignore")  # of vLLM's own imports
def test_async_scheduling_gets_its_own_class() -> None:
    """A subclass of the sync scheduler would never be given drafts there."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from paceline.integrations.vllm.factory import _base, _paced

    assert issubclass(_paced(_base(True)), AsyncScheduler)
    assert not issubclass(_paced(_base(False)), AsyncScheduler)


def test_structured_output(model: Path) -> None:
    jobs = {"schema": SCHEMA, "jobs": [PROMPTS[:6]], "max_tokens": 40}
    stock = generate(model, paced=False, **jobs)
    made = generate(model, spec=NGRAM, **jobs)
    assert made["texts"] == stock["texts"]
    check_paced(made["about"], base="Scheduler")


def test_aborts_in_mid_flight(model: Path, plain: list[dict[str, list[int]]]) -> None:
    made = generate(model, spec=NGRAM, abort_after=8)
    (texts,) = made["texts"]
    assert texts == {name: ids for name, ids in plain[2].items() if int(name) % 3 != 2}
    check_paced(made["about"], base="Scheduler")


def test_wrong_option_stops_the_start(model: Path) -> None:
    with pytest.raises(AssertionError, match=r"no option lenght.*Allowed are"):
        generate(model, spec=NGRAM, engine={"additional_config": {"paceline": {"lenght": 2}}}, jobs=[PROMPTS[:1]])


def test_without_speculation_it_stands_aside(model: Path, plain: list[dict[str, list[int]]]) -> None:
    made = generate(model, jobs=[PROMPTS[:1]])
    assert made["texts"] == plain[:1]
    assert not any(name.startswith("Paced") for name in made["about"]["scheduler"])
