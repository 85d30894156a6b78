"""Training text: the target's own words in step without padding, shards that are whole, prompts, token counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import make_loaded

from paceline.cli.numbers import amount
from paceline.errors import ConfigError, CorruptFileError, InputError, UnsupportedModelError
from paceline.model.loader import LoadedModel
from paceline.train import vocab
from paceline.train.attention import use_library_attention
from paceline.train.documents import Documents, clean, join, load_documents, load_shard, loop_start, save_shard
from paceline.train.prompts import Kind, chat_frame, file_scripts, own_scripts, read_prompts
from paceline.train.write import BatchWriter, WriteSettings, read_text, write_text

TEMPLATE = (
    "{% for m in messages %}{{ 'w3 ' + ('w4 ' if m.role == 'user' else 'w5 ') + m.content + ' w2 w6 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w3 w5 ' }}{% endif %}"
)
"""w3 begins a turn, w4 and w5 are roles, w2 ends it (and is the end token), w6 stands for a line break."""


@pytest.fixture
def base() -> LoadedModel:
    return make_loaded()


@pytest.fixture
def chat() -> LoadedModel:
    loaded = make_loaded(seed=1)
    loaded.tokenizer.chat_template = TEMPLATE
    # The marks that `chat_frame` looks for are words of their own for it.
    return loaded


def write(target: LoadedModel, settings: WriteSettings, index: int = 0) -> list[tuple[list[int], list[bool]]]:
    target.model.set_attn_implementation("sdpa")
    script, rule = own_scripts(target.tokenizer, target.eos_token_ids, turns=settings.turns)
    heats = settings.temperatures
    rows = [(script, heats[b % len(heats)]) for b in range(settings.batch)]
    writer = BatchWriter(target, rows, rule, settings, index)
    return [(tokens.tolist(), own.tolist()) for tokens, own in writer.run()]


def check_greedy(target: LoadedModel, tokens: list[int], own: list[bool]) -> int:
    """Every answer token is the likeliest after what stands before it; returns their number."""
    with torch.no_grad():
        best = target.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].argmax(-1).tolist()
    for i in range(1, len(tokens)):
        assert not own[i] or tokens[i] == best[i - 1]
    return sum(own)


def test_the_chat_frame_is_read_off_the_template(chat: LoadedModel) -> None:
    frame = chat_frame(chat.tokenizer)
    assert frame is not None
    assert frame.before_user == (3, 4)
    assert frame.after_user == (2, 6, 3, 5)
    assert frame.between == (2, 6, 3, 4)
    chat.tokenizer.chat_template = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UnsupportedModelError, match="missing"):
        chat_frame(chat.tokenizer)


def test_a_base_model_begins_at_its_first_token(base: LoadedModel) -> None:
    settings = WriteSettings(length=40, batch=32, temperatures=(0.0,))
    documents = write(base, settings)
    for tokens, own in documents:
        assert tokens[0] == 2
        opening = own.index(True) - 1 if any(own) else len(tokens) - 1
        assert not any(own[:opening])
        assert 1 <= opening <= 12
        assert len(tokens) <= 40
        assert tokens[-1] == 2 or len(tokens) == 40 or sum(len(t) > len(tokens) for t, _ in documents) <= 2
    assert sum(check_greedy(base, tokens, own) for tokens, own in documents) > 32
    assert len({tuple(tokens) for tokens, _ in documents}) > 16


def test_rows_that_end_leave_the_batch_and_the_others_go_on(base: LoadedModel) -> None:
    """Greedy answers of a batch in which rows end at different times are still the model's own."""
    settings = WriteSettings(length=120, batch=48, temperatures=(0.0, 1.0))
    documents = write(base, settings)
    lengths = [len(tokens) for tokens, _ in documents]
    assert len(set(lengths)) > 3
    assert sum(check_greedy(base, *documents[b]) for b in range(0, 48, 2)) > 100
    with pytest.raises(AssertionError):  # the others were drawn at temperature 1
        [check_greedy(base, *documents[b]) for b in range(1, 48, 2)]


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma2", "gpt2"])
def test_other_families_write_too(architecture: str) -> None:
    """Among them sliding windows shorter than the documents."""
    target = make_loaded(architecture)
    use_library_attention(target.model)
    script, rule = own_scripts(target.tokenizer, target.eos_token_ids, turns=1)
    settings = WriteSettings(length=64, batch=24)
    documents = BatchWriter(target, [(script, 0.0)] * 24, rule, settings, 0).run()
    assert sum(check_greedy(target, tokens.tolist(), own.tolist()) for tokens, own in documents) > 48


def test_a_chat_model_writes_both_sides(chat: LoadedModel) -> None:
    """Framing is the template's, and the user's turns are not counted as answers."""
    settings = WriteSettings(length=300, batch=24, temperatures=(0.0,), turns=2)
    exchanges = 0
    for tokens, own in write(chat, settings):
        assert tokens[:2] == [3, 4]
        assert tokens[2] != 2, "a user's turn is not empty"
        end = tokens.index(2) if 2 in tokens else None
        if end is None or len(tokens) < end + 5:
            continue
        assert end <= 2 + 96
        assert tokens[end : end + 4] == [2, 6, 3, 5]
        assert own[: end + 5] == [False] * (end + 4) + [True]
        check_greedy(chat, tokens, own)
        answer_end = next((i for i in range(end + 4, len(tokens)) if tokens[i] == 2), None)
        if answer_end is not None and len(tokens) > answer_end + 5:
            assert own[answer_end]
            assert tokens[answer_end + 1 : answer_end + 4] == [6, 3, 4]
            assert not own[answer_end + 4]
            exchanges += 1
    assert exchanges > 3


def test_the_law_of_an_answer_is_the_models(base: LoadedModel) -> None:
    """Tokens drawn at temperature 1 after one prompt have the model's probabilities (p < 1e-6 to fail by chance)."""
    prompt = Path(__file__).with_suffix(".none")
    base.model.set_attn_implementation("sdpa")
    script = own_scripts(base.tokenizer, (2,), turns=1)[0]
    script = replace(script, kinds=(Kind.GIVEN, Kind.ANSWER), given=((5, 9, 11), ()))
    rule = own_scripts(base.tokenizer, (2,), turns=1)[1]
    settings = WriteSettings(length=4, batch=4000, temperatures=(1.0,), prompts=str(prompt))
    drawn = [int(tokens[3]) for tokens, _ in BatchWriter(base, [(script, 1.0)] * 4000, rule, settings, 0).run()]
    with torch.no_grad():
        law = base.model(input_ids=torch.tensor([[5, 9, 11]]), use_cache=False).logits[0, -1].softmax(-1).double()
    counts = np.bincount(drawn, minlength=96)
    expected = 4000 * law.numpy()
    common = expected >= 5
    chi2 = float((((counts - expected) ** 2) / expected)[common].sum())
    degrees = int(common.sum())
    assert chi2 < degrees + 6 * np.sqrt(2 * degrees) + 20


def test_text_goes_on_where_it_stopped(base: LoadedModel, tmp_path: Path) -> None:
    settings = WriteSettings(length=32, batch=16)
    seen: list[int] = []
    whole = write_text(tmp_path / "a", base, settings, 1500, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1500
    assert len(whole.tokens) >= 1400  # what two shards have in common counts once
    write_text(tmp_path / "b", base, settings, 400)
    (tmp_path / "b" / "shard-00009.part").write_bytes(b"cut off")
    again = write_text(tmp_path / "b", base, settings, 1500)
    assert np.array_equal(whole.tokens, again.tokens)
    shards = sorted((tmp_path / "b").glob("shard-*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].unlink()
    write_text(tmp_path / "b", base, settings, 1500)
    assert shards[1].read_bytes() == content, "a shard that was lost comes back as it was"
    assert np.array_equal(read_text(tmp_path / "b", base).tokens, whole.tokens)


def test_a_damaged_shard_is_named(base: LoadedModel, tmp_path: Path) -> None:
    settings = WriteSettings(length=32, batch=16)
    whole = write_text(tmp_path, base, settings, 400)
    path = tmp_path / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    for damaged in (content[:-5], content[:-40] + bytes([content[-40] ^ 1]) + content[-39:], b"x"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match="Delete this file") as caught:
            write_text(tmp_path, base, settings, 400)
        assert caught.value.field == str(path)
    path.unlink()
    assert np.array_equal(write_text(tmp_path, base, settings, 400).tokens, whole.tokens)


def test_text_of_another_model_or_other_settings_is_refused(base: LoadedModel, tmp_path: Path) -> None:
    settings = WriteSettings(length=32, batch=16)
    write_text(tmp_path, base, settings, 300)
    with pytest.raises(ConfigError, match="another model"):
        read_text(tmp_path, make_loaded(vocab_size=90))
    other = replace(settings, length=24, seed=3)
    assert len(write_text(tmp_path, base, other, 300).tokens), "enough is there, so it does not matter"
    with pytest.raises(ConfigError, match="another length, seed"):
        write_text(tmp_path, base, other, 3000)
    with pytest.raises(ConfigError, match="no training text"):
        read_text(tmp_path / "empty", base)
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"text\.json"):
        read_text(tmp_path, base)


def test_prompts_of_ones_own(base: LoadedModel, chat: LoadedModel, tmp_path: Path) -> None:
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("w7 w8\n\nw9 w10 w11\n")
    lines.write_text('{"prompt": "w7 w8"}\n{"turns": ["w9", "w12 w13"], "category": "x"}\n')
    assert read_prompts(plain) == [["w7 w8"], ["w9 w10 w11"]]
    assert read_prompts(lines) == [["w7 w8"], ["w9", "w12 w13"]]
    assert [s.given[0] for s in file_scripts(plain, base.tokenizer, (2,))] == [(7, 8), (9, 10, 11)]
    second = file_scripts(lines, chat.tokenizer, (2,))[1]
    assert second.kinds == (Kind.GIVEN, Kind.ANSWER, Kind.GIVEN, Kind.ANSWER)
    assert second.given == ((3, 4, 9, 2, 6, 3, 5), (), (6, 3, 4, 12, 13, 2, 6, 3, 5), ())
    settings = WriteSettings(length=64, batch=8, temperatures=(0.0,), prompts=str(lines))
    text = write_text(tmp_path / "text", chat, settings, 20)
    for start, length in zip(text.starts, text.lengths, strict=True):
        check_greedy(chat, text.tokens[start : start + length].tolist(), text.own[start : start + length].tolist())
    with pytest.raises(ConfigError, match="more temperatures"):  # two prompts, and only one way to answer
        write_text(tmp_path / "text", chat, settings, 2000)
    warm = replace(settings, temperatures=(0.0, 1.0))
    found = write_text(tmp_path / "warm", chat, warm, 2000)
    both = [sum(w in piece for piece in np.split(found.tokens, found.starts[1:])) for w in (7, 9)]
    assert min(both) > 3, "every prompt is answered at every temperature in turn"
    for wrong, message in (('{"prompt": 3}', "neither"), ('{"turns": []}', "neither"), ("{", "not JSON"), ("", "no p")):
        lines.write_text(wrong)
        with pytest.raises(InputError, match=message):
            read_prompts(lines)
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "none")
    plain.write_text("w7 " * 80)
    with pytest.raises(ConfigError, match="--length"):
        write_text(tmp_path / "other", base, replace(settings, prompts=str(plain)), 100)


def test_loops_are_cut() -> None:
    start = np.arange(100, 130, dtype=np.int32)
    loop = np.tile(np.array([1, 2, 3, 4, 5, 6, 7, 8], dtype=np.int32), 6)
    assert loop_start(np.concatenate([start, loop])) == 30 + 16
    assert loop_start(start) == 30
    assert loop_start(np.concatenate([start, loop[:24]])) == 54, "three rounds are not yet a loop"
    assert loop_start(np.concatenate([start, np.full(10, 7, dtype=np.int32)])) == 40, "nor is a short run"
    assert loop_start(np.concatenate([start, np.full(90, 7, dtype=np.int32)])) == 32


def test_repeated_and_unanswered_documents_are_dropped(tmp_path: Path) -> None:
    a, b = np.array([1, 2, 3], dtype=np.int32), np.array([4, 5], dtype=np.int32)
    yes, no = np.array([False, True, True]), np.array([False, False])
    documents = clean([(a, yes), (b, no), (a, yes), (b, ~no)])
    assert documents.lengths.tolist() == [3, 2]
    assert documents.select(np.array([1, 0])).tokens.tolist() == [4, 5, 1, 2, 3]
    for i in range(2):
        save_shard(tmp_path / f"{i}.safetensors", documents)
    assert load_shard(tmp_path / "0.safetensors").own.tolist() == documents.own.tolist()
    both = load_documents([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    assert both.tokens.tolist() == documents.tokens.tolist()
    assert len(join([]).tokens) == 0


def test_token_counts(tmp_path: Path, base: LoadedModel) -> None:
    text = tmp_path / "t.txt"
    text.write_text("w5 w5 w9\n" * 3 + "w7 w5\n")
    shards = tmp_path / "text"
    shards.mkdir()
    own = np.array([True, True, False, True])
    shard = Documents(np.array([9, 9, 50, 2], dtype=np.int32), own, np.array([4]))
    save_shard(shards / "shard-00000.safetensors", shard)
    seen: list[tuple[int, int]] = []
    counts = vocab.count_tokens([text, shards], base.tokenizer, 96, lambda *x: seen.append(x))
    assert {int(i): int(counts[i]) for i in np.flatnonzero(counts)} == {2: 1, 5: 7, 7: 1, 9: 5}
    assert seen[-1][0] == seen[-1][1] > 0
    assert vocab.rank(counts, 3, (90,)).tolist() == [5, 9, 90], "end tokens are forced in"
    assert vocab.rank(counts, 6, (2,)).tolist() == [5, 9, 2, 7, 0, 1], "ties and the unseen by lowest id"
    assert vocab.rank(counts, 2, (9,)).tolist() == [5, 9]
    assert sorted(vocab.rank(counts, 96, (2,)).tolist()) == list(range(96))
    for size in (1, 97):
        with pytest.raises(ConfigError, match="size"):
            vocab.rank(counts, size, (2,))
    ids = vocab.rank(counts, 3, (90,))
    assert vocab.save_ranking(tmp_path / "v.npy", ids, counts, {}) == pytest.approx(12 / 14)
    assert np.load(tmp_path / "v.npy").tolist() == [5, 9, 90]
    vocab.save_ranking(tmp_path / "v.json", ids, counts, {"target": {"name": "tiny"}})
    assert json.loads((tmp_path / "v.json").read_text())["token_ids"] == [5, 9, 90]
    with pytest.raises(ConfigError, match=r"\.npy or \.json"):
        vocab.save_ranking(tmp_path / "v.bin", ids, counts, {})
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError):
            vocab.count_tokens([missing], base.tokenizer, 96)


def test_amounts() -> None:
    assert [amount(t) for t in ("500", "20k", "5M", "1.5k")] == [500, 20_000, 5_000_000, 1_500]
    for wrong in ("0", "k", "-3", "x", "1.5.2"):
        with pytest.raises(Exception, match="such as"):
            amount(wrong)
