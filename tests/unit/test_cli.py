"""The command line with a stand-in for the engine: what is printed, written and returned."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.cli import bench_spec, bench_systems, chat, demo, generate, options, profile, pull
from paceline.cli.main import COMMANDS, main, parse_args
from paceline.config import EngineConfig, SamplingParams
from paceline.engine.speculation import check_speculation
from paceline.errors import DownloadError, PromptTooLongError
from paceline.outputs import Completion, Generation, GenerationStats, StreamChunk

WORDS = ("One", " two", " three", " four")


def make_generation(
    words: tuple[str, ...] = WORDS, *, n: int = 1, error: str | None = None, prompt: str = "p"
) -> Generation:
    stats = GenerationStats(
        target_forwards=2,
        draft_tokens=3,
        accepted_tokens=2,
        mean_accepted_length=len(words) / 2,
        seconds=0.5,
        ttft_seconds=0.1,
        tokens_per_second=7.5,
        accepted_by={"ngram": 2},
        cached_tokens=0,
        preemptions=0,
    )
    outputs = tuple(
        Completion(
            index=i,
            text="".join(words),
            token_ids=tuple(range(len(words))),
            finish_reason="length",
            logprobs=None,
            seed=7 + i,
            stats=stats,
            error=error,
        )
        for i in range(n)
    )
    return Generation(prompt=prompt, prompt_token_ids=(1, 2, 3), prompt_logprobs=None, outputs=outputs)


class FakeLLM:
    """Answers everything with the same four words and notes what it was asked."""

    model_name = "fake"
    loaded = SimpleNamespace(precision="float32")

    def __init__(self, words: tuple[str, ...] = WORDS, error: str | None = None) -> None:
        self.words, self.error = words, error
        self.calls: list[Any] = []
        self.interrupt_after: int | None = None

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append("closed")

    def check(self, prompt: Any, params: Any) -> None:  # noqa: ARG002
        if "too long" in str(prompt):
            raise PromptTooLongError("has 9001 tokens.", field="prompt")

    def generate(self, prompts: Any, params: Any) -> list[Generation]:
        if self.interrupt_after is not None and len(self.calls) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.calls.append((prompts, params))
        return [
            make_generation(self.words, n=p.n, error=self.error, prompt=str(text))
            for text, p in zip(prompts, params, strict=True)
        ]

    def chat(self, messages: Any, params: Any, *, cache_salt: str = "") -> list[Generation]:
        if messages and isinstance(messages[0], list):
            return self.generate(messages, params)
        self.calls.append((messages, params, cache_salt))
        return [make_generation(self.words, error=self.error)]

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[StreamChunk]:
        self.calls.append((prompt, params))
        for i, word in enumerate(self.words):
            last = i + 1 == len(self.words)
            yield StreamChunk(
                token_ids=(i,),
                drafters=("ngram" if i % 2 else None,),
                pieces=(word,),
                finish_reason="length" if last else None,
                generation=make_generation(self.words, error=self.error) if last else None,
            )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """Every command gets this engine; the options it was opened with are its first call."""
    llm = FakeLLM()

    def open_llm(model: str, settings: Any, console: Any) -> FakeLLM:  # noqa: ARG001
        llm.calls.append((model, dict(settings)))
        return llm

    monkeypatch.setattr(options, "open_llm", open_llm)
    return llm


def examples(epilog: str) -> list[str]:
    lines = [line.split("    ")[0] for line in epilog.replace("\n  ", "\n").splitlines()]
    return [line for line in lines if line.startswith("paceline ")]


@pytest.mark.parametrize(
    "module", [generate, chat, pull, demo, profile, bench_spec, bench_systems], ids=lambda m: m.__name__
)
def test_help_examples_parse(module: Any) -> None:
    commands = examples(module.EPILOG)
    assert len(commands) >= 2
    for command in commands:
        words = shlex.split(command.split(" < ")[0])
        args = parse_args(words[1:])
        assert args.run is module.run
        given = getattr(args, "speculation", None) or []
        for spec in [given] if isinstance(given, str) else given:
            check_speculation(EngineConfig(speculation=spec))


def test_demo_names_commands_that_parse() -> None:
    for command in examples(demo.NEXT):
        parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("command", ["", *COMMANDS, "bench spec", "bench systems", "train draft", "train vocab"])
def test_every_help_has_a_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "usage: paceline" in out
    assert command in ("bench", "train", "vllm") or "examples:" in out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom paceline.cli.main import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("paceline ")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("generate m", "exactly one"),
        ("generate m --prompt a -", "exactly one"),
        ("generate m --prompt a --max-tokens zero", "--max-tokens"),
        ("generate m --prompt a --max-tokens 0", "max_tokens"),
        ("generate m --prompt a --top-p 0", "top_p"),
        ("generate m --prompt a --min-tokens 9 --max-tokens 8", "min_tokens"),
        ("generate m --prompt a --logit-bias 5", "ID=X"),
        ("generate m --prompt a --dtype int8", "--dtype"),
        ("generate m --prompt a --max-model-len 0", "max_model_len"),
        ("generate m --prompt a --speculation ngram:k=300", "ngram:k=300"),
        ("generate m --prompt a --speculation auto --speculative-config {}", "not allowed with"),
        ("generate m --prompt a --speculation nonsense:k=2", "nonsense"),
        ("generate m --prompt a --rule nonsense", "nonsense"),
        ("generate m --prompt a --tree nonsense", "nonsense"),
        ("generate m --prompt a --json no/such/folder/x.json", "does not exist"),
        ("generate m --prompt-file missing.jsonl", "missing.jsonl"),
        ("generate m --prompt a --nonsense", "--nonsense"),
        ("bench spec m --speculation auto ngram:k=x", "ngram:k=x"),
        ("bench spec m --speculation auto --limit 0", "--limit"),
        ("bench spec m --speculation auto --questions missing.jsonl", "missing.jsonl"),
        ("nonsense", "nonsense"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_bad_arguments_exit_2_in_two_lines(command: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(shlex.split(command))
    except SystemExit as ended:
        code = ended.code
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: ")
    assert says in err
    assert len(err.strip().splitlines()) <= 2


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (PromptTooLongError("is too long.", field="prompt"), 2, "error: prompt: is too long."),
        (DownloadError("no network.", fix="Try again."), 1, "error: no network. Try again."),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError("disk full"), 1, "error: disk full"),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException,
    code: int,
    says: str,
    fake: FakeLLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(fake, "stream", fail)
    assert main(["generate", "m", "--prompt", "a"]) == code
    assert capsys.readouterr().err.strip() == says


def test_defaults_are_those_of_the_dataclasses() -> None:
    args = parse_args(["generate", "m", "--prompt", "a"])
    assert options.sampling_params(args) == SamplingParams()
    assert EngineConfig.from_options(options.engine_options(args)) == EngineConfig()


def test_options_reach_engine_and_request(fake: FakeLLM) -> None:
    command = (
        "generate m --prompt hi --chat --max-tokens 9 --temperature 0.5 --top-k 3 --seed 4 --stop a --stop b "
        "--stop-token-id 5 --ignore-eos --logit-bias 3=-1.5 --prediction guess --speculation ngram:k=2 "
        "--dtype float32 --rule rejection --tree chain"
    )
    assert main(shlex.split(command)) == 0
    (model, settings), (prompt, params), closed = fake.calls
    assert (model, closed) == ("m", "closed")
    assert {
        "speculation": "ngram:k=2",
        "dtype": "float32",
        "rule": "rejection",
        "tree": "chain",
    }.items() <= settings.items()
    assert prompt == [{"role": "user", "content": "hi"}]
    assert params == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_k=3,
        seed=4,
        stop=("a", "b"),
        stop_token_ids=(5,),
        ignore_eos=True,
        logit_bias={3: -1.5},
        prediction="guess",
    )


def test_vllm_config_is_an_equivalent(fake: FakeLLM) -> None:
    config = '{"method": "ngram", "num_speculative_tokens": 4}'
    assert main(["generate", "m", "--prompt", "a", "--speculative-config", config]) == 0
    assert fake.calls[0][1]["speculation"].startswith("ngram:k=4")


def test_one_prompt_streams_plain_text(fake: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "a"]) == 0
    assert capsys.readouterr().out == "One two three four\n"
    assert fake.calls[1][0] == "a"


@pytest.mark.parametrize("command", ["generate m - --max-tokens 5", "generate m --max-tokens 5 -"])
def test_prompt_from_stdin(command: str, fake: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
    assert main(command.split()) == 0
    assert fake.calls[1][0] == "from stdin"


@pytest.mark.usefixtures("fake")
def test_json_of_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "a", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["model", "prompt_tokens", "token_ids", "text", "finish_reason", "seed", "stats"]
    assert {
        "target_forwards", "draft_tokens", "accepted_tokens", "mean_accepted_length", "seconds",
        "ttft_seconds", "tokens_per_second",
    } <= set(result["stats"])  # fmt: skip
    assert (result["model"], result["prompt_tokens"], result["seed"]) == ("fake", 3, 7)


def test_json_of_several_answers(fake: FakeLLM, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, answers = tmp_path / "p.jsonl", tmp_path / "a.json"
    prompts.write_text(
        '{"prompt": "a\u2028b"}\n\n{"messages": [{"role": "user", "content": "c"}], "max_tokens": 5}\n{"prompt": "d"}\n'
    )
    assert main(["generate", "m", "--prompt-file", str(prompts), "--n", "2", "--json", str(answers)]) == 0
    result = json.loads(answers.read_text())
    assert list(result) == ["model", "outputs"]
    assert [entry["seed"] for entry in result["outputs"]] == [7, 8] * 3
    assert all("stats" in entry and "model" in entry for entry in result["outputs"])
    plain, chats = fake.calls[1:3]
    assert plain[0] == ["a\u2028b", "d"]
    assert [p.max_tokens for p in chats[1]] == [5]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 of"),
        ("[1]", "line 2 of"),
        ('{"text": "a"}', "needs either"),
        ('{"prompt": "a", "messages": []}', "needs either"),
        ('{"prompt": ""}', "not empty"),
        ('{"prompt": 3}', "line 2"),
        ('{"messages": [{"role": "user"}]}', "line 2"),
        ('{"prompt": "a", "temprature": 0}', "temprature"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "a", "stop": 5}', "line 2"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_bad_line_of_a_prompt_file_is_named(
    line: str, says: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    assert main(["generate", "m", "--prompt-file", str(path)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "line 2" in err


def test_a_failed_request_exits_1(fake: FakeLLM, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake.error = "broke"
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert main(["generate", "m", "--prompt-file", str(path), "--json"]) == 1
    captured = capsys.readouterr()
    assert [entry["error"] for entry in json.loads(captured.out)["outputs"]] == ["broke", "broke"]
    assert "error: prompt 2: broke" in captured.err


def test_interruption_keeps_finished_prompts(
    fake: FakeLLM, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "BATCH", 2)
    fake.interrupt_after = 2  # the opening and the first batch
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' * 5)
    assert main(["generate", "m", "--prompt-file", str(path), "--json"]) == 130
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["outputs"]) == 2
    assert "2 of 5" in captured.err


def test_chat_keeps_and_resets_history(
    fake: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n/stats\n/reset\nnew\n/what\n/quit\nnever\n"))
    assert main(["chat", "m", "--system", "be kind"]) == 0
    asked = [call[0] for call in fake.calls[1:-1]]
    assert [[m["role"] for m in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert asked[1][2]["content"] == "One two three four"
    out = capsys.readouterr().out
    assert "7.5 tokens/s" in out
    assert "ngram 2" in out
    assert "/reset forgets" in out


def test_chat_survives_a_request_that_cannot_run(
    fake: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = chat.Conversation(fake, SamplingParams(), options.stdout_console())  # type: ignore[arg-type]

    def fail(*_: Any) -> Any:
        raise PromptTooLongError("is too long.", field="prompt")

    monkeypatch.setattr(fake, "stream", fail)
    assert conversation.handle("hello")
    assert conversation.messages == []
    assert "is too long" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_only(fake: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = chat.Conversation(fake, SamplingParams(), options.stdout_console())  # type: ignore[arg-type]
    stream = fake.stream

    def interrupted_stream(prompt: Any, params: SamplingParams) -> Iterator[StreamChunk]:
        for i, chunk in enumerate(stream(prompt, params)):
            if i == 1:
                signal.raise_signal(signal.SIGINT)
            yield chunk

    monkeypatch.setattr(fake, "stream", interrupted_stream)
    assert conversation.handle("hello")
    assert conversation.messages[-1] == {"role": "assistant", "content": "One two"}


def test_accepted_tokens_are_coloured_on_a_terminal_only() -> None:
    from rich.console import Console

    chunk = StreamChunk(
        token_ids=(1, 2),
        drafters=(None, "ngram"),
        pieces=("a", "[b]c"),
        finish_reason=None,
        generation=None,
    )
    for terminal, colors, expected in ((True, "standard", "a\x1b[32m[b]c\x1b[0m"), (False, "auto", "a[b]c")):
        console = Console(file=io.StringIO(), force_terminal=terminal, color_system=colors, no_color=False)
        chat.print_chunk(console, chunk)
        assert console.file.getvalue() == expected  # type: ignore[attr-defined]


def test_demo_ends_with_a_table(fake: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "total" in out
    assert "yes" in out
    assert "paceline chat" in out
    assert "\x1b[" not in out
    (model, off), (shared, on) = fake.calls[:2]
    assert (model, shared) == ("smollm2-135m", FakeLLM.loaded)
    assert (off["speculation"], on.get("speculation", "auto")) == ("none", "auto")
    assert off["dtype"] == on["dtype"] == "auto"
    assert main(["demo", "--model", "other"]) == 0  # bf16 may round differently with drafts
    assert {call[1]["dtype"] for call in fake.calls if call[0] == "other"} == {"float32"}


@pytest.mark.parametrize("command", [["demo"], ["bench", "spec", "fake"], ["bench", "load", "fake", "--users", "1"]])
def test_a_tree_is_for_the_speculating_engines(fake: FakeLLM, command: list[str]) -> None:
    """The baseline beside them drafts nothing, and would refuse it."""
    with contextlib.suppress(Exception):  # the stand-in knows too little for all of them to end well
        main([*command, "--speculation", "draft:model=x", "--tree", "cape"])
    opened = [
        call[1]
        for call in fake.calls
        if isinstance(call, tuple) and call[0] in ("fake", "smollm2-135m", FakeLLM.loaded)
    ]
    assert opened
    for settings in opened:
        assert ("tree" in settings) == (settings["speculation"] != "none")
        assert settings["rule"] == "coupled"


def test_demo_exits_1_when_a_text_differs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engines = iter([FakeLLM(), FakeLLM((*WORDS[:3], " five"))])
    monkeypatch.setattr(options, "open_llm", lambda *_: next(engines))
    assert main(["demo"]) == 1
    assert "no" in capsys.readouterr().out


def test_demo_compares_lengths_and_text() -> None:
    full, short = make_generation(), make_generation(WORDS[:3])
    output = dataclasses.replace(full.outputs[0], text="One two three four!")
    assert demo.Pair("t", full, full).same
    assert not demo.Pair("t", full, short).same
    assert not demo.Pair("t", full, dataclasses.replace(full, outputs=(output,))).same


def test_a_line_that_cannot_run_is_named_before_anything_runs(
    fake: FakeLLM, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine", "logit_bias": {"12": 5}}\n{"prompt": "too long"}\n')
    assert main(["generate", "fake", "--prompt-file", str(file)]) == 2
    assert "line 2" in capsys.readouterr().err
    assert fake.calls[-1] == "closed"
    assert len(fake.calls) == 2, "only opened and closed"


def test_logprobs_need_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "fake", "--prompt", "a", "--logprobs", "2"]) == 2
    assert "--json" in capsys.readouterr().err


def test_every_drafter_has_a_colour_and_is_named_by_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that is new in the registry, without a line anywhere else."""
    from paceline.draft.registry import DRAFTERS

    monkeypatch.setitem(DRAFTERS, "newest", DRAFTERS["ngram"])
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    out = capsys.readouterr().out
    for name in DRAFTERS:
        assert re.search(rf"drafters:[^()]*\b{name}\b", out), name
        assert chat.drafter_style(name)
    assert str(chat.legend("newest:k=4+ngram")).startswith("accepted draft tokens by drafter: newest ngram;")
