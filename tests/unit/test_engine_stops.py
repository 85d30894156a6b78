"""When and where a text ends, and that what was streamed is never taken back. All of it the same under speculation."""

from __future__ import annotations

import pytest
from engine_tools import greedy, llm, loaded, make_request, prompt_of, reference, run, text_of, words
from fakes import make_llm

from paceline import LLM, SamplingParams
from paceline.engine.detokenizer import Detokenizer

PROMPT = prompt_of(18)
GREEDY = reference(PROMPT, 24)
SPECULATION = ["none", "recycling:k=20", "prediction:k=8"]
speculations = pytest.mark.parametrize("speculation", SPECULATION)


def complete(speculation: str, engine: LLM | None = None, **options: object) -> tuple[str, tuple[int, ...], str]:
    """One greedy completion; with `prediction` the whole text is drafted, so stops fall inside accepted drafts."""
    if "prediction" in speculation:
        options["prediction"] = " ".join(f"w{t}" for t in GREEDY)
    (found,) = (engine or llm(speculation)).generate([PROMPT], greedy(24, **options))
    if "prediction" in speculation and len(found.token_ids) > 3:
        assert found.stats.accepted_tokens > 0
    return found.text, found.token_ids, found.finish_reason


def test_the_reference_has_different_words() -> None:
    assert len(set(GREEDY[:12])) >= 10
    assert not {0, 2} & set(GREEDY)


@speculations
@pytest.mark.parametrize(("token", "inside"), [(0, 1), (5, 1), (5, 0), (11, 2)])
def test_a_stop_string_across_token_borders(speculation: str, token: int, inside: int) -> None:
    """The stop string begins inside one token's text and ends inside the next one's."""
    before, after = words(GREEDY[: token + 1]), words([GREEDY[token + 1]])
    stop = before[-1 - inside :] + after[:2]
    at = words(GREEDY).find(stop)
    text, tokens, reason = complete(speculation, stop=stop)
    assert (text, reason) == (words(GREEDY)[:at], "stop")
    assert words(tokens).startswith(text + stop)
    assert not words(tokens[:-1]).startswith(text + stop), "it ends at the first token that completes it"


@speculations
def test_the_first_of_several_stops_wins(speculation: str) -> None:
    late, early = words(GREEDY[9:11]), words(GREEDY[4:6])
    for stops in ((late, early), (early, late), (early, "never")):
        assert complete(speculation, stop=stops)[0] == words(GREEDY[:4])


@speculations
def test_two_stops_in_one_token_end_before_the_first(speculation: str) -> None:
    third = words([GREEDY[3]])
    assert complete(speculation, stop=(third[1:], third[:2]))[0] == words(GREEDY)[: words(GREEDY).find(third[:2])]
    assert complete(speculation, stop=("w",))[:2] == ("", GREEDY[:1])


@speculations
def test_a_stop_that_never_comes_holds_nothing_back_at_the_end(speculation: str) -> None:
    """The text ends with the beginning of a stop string: it is released when the request ends."""
    stop = words(GREEDY[23:24]) + "w0w0"
    assert complete(speculation, stop=stop) == (words(GREEDY), GREEDY, "length")


@speculations
def test_no_stop_string_counts_before_min_tokens(speculation: str) -> None:
    stop = words(GREEDY[2:4])
    assert complete(speculation, stop=stop, min_tokens=4)[1] == GREEDY[:4]
    assert complete(speculation, stop=stop, min_tokens=5) == (words(GREEDY), GREEDY, "length")


def test_a_stop_string_that_was_passed_does_not_count_later() -> None:
    """Whether a stop completed before `min_tokens` counts must not depend on how long the other stops are."""
    stop = words([GREEDY[2]])
    assert stop not in words(GREEDY[3:])
    alone = complete("none", stop=stop, min_tokens=4)
    assert alone == (words(GREEDY), GREEDY, "length")
    assert complete("none", stop=(stop, "x" * 40), min_tokens=4) == alone


@speculations
def test_stop_token_ids(speculation: str) -> None:
    assert complete(speculation, stop_token_ids=(GREEDY[7],)) == (words(GREEDY[:8]), GREEDY[:8], "stop")
    assert complete(speculation, stop_token_ids=(GREEDY[0],)) == (words(GREEDY[:1]), GREEDY[:1], "stop")


@speculations
def test_min_tokens_masks_stop_tokens(speculation: str) -> None:
    stop = GREEDY[5]
    text, tokens, _ = complete(speculation, stop_token_ids=(stop,), min_tokens=10)
    assert tokens[:5] == GREEDY[:5]
    assert stop not in tokens[:10]
    assert text == words(tokens)


@speculations
def test_the_end_token(speculation: str) -> None:
    """The model's own end token ends the text unless `ignore_eos`; several are possible."""
    original = loaded()
    ends = (GREEDY[6], GREEDY[9])
    engine = make_llm(
        type(original)(
            **{f: getattr(original, f) for f in original.__dataclass_fields__ if f != "eos_token_ids"},
            eos_token_ids=ends,
        ),
        speculation=speculation,
    )
    assert complete(speculation, engine, ignore_eos=False)[1:] == (GREEDY[:7], "stop")
    assert complete(speculation, engine, ignore_eos=True)[1:] == (GREEDY, "length")
    masked = complete(speculation, engine, ignore_eos=False, min_tokens=8)[1]
    assert masked[:6] == GREEDY[:6]
    assert not set(ends) & set(masked[:8])


@speculations
@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_tokens(speculation: str, limit: int) -> None:
    engine = llm(speculation)
    prediction = " ".join(f"w{t}" for t in GREEDY)
    for _ in range(2):
        (found,) = engine.generate([PROMPT], greedy(limit, prediction=prediction))
        assert (found.token_ids, found.finish_reason) == (GREEDY[:limit], "length")


@speculations
@pytest.mark.parametrize("room", [1, 2, 9])
def test_max_model_len(speculation: str, room: int) -> None:
    """The context ends the output, also in the middle of what would be a long draft."""
    engine = llm(speculation.replace("k=20", "k=12"), max_model_len=len(PROMPT) + room)
    assert complete(speculation, engine)[1:] == (GREEDY[:room], "length")


@speculations
def test_streamed_pieces_are_the_final_text(speculation: str) -> None:
    """Pieces come one per token, are never taken back, and hold no part of a stop string."""
    engine = llm(speculation)
    stop = words(GREEDY[9:11])[:-1]
    prediction = " ".join(f"w{t}" for t in GREEDY)
    for params in (greedy(24), greedy(24, stop=stop), greedy(24, stop=(words(GREEDY[23:]) + "w",))):
        params = SamplingParams(**{**{f: getattr(params, f) for f in params.__slots__}, "prediction": prediction})
        chunks = list(engine.stream(PROMPT, params))
        final = chunks[-1].generation
        assert final is not None
        assert all(len(c.pieces) == len(c.token_ids) == len(c.drafters) for c in chunks)
        assert "".join(c.text for c in chunks) == final.text
        assert tuple(t for c in chunks for t in c.token_ids) == final.token_ids
        assert final.text == words(GREEDY).split(params.stop[0])[0] if params.stop else words(GREEDY)
        assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        seen = ""
        for chunk in chunks:
            seen += chunk.text
            assert not any(s in seen for s in params.stop)
            assert words(final.token_ids).startswith(seen)


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    engine = llm().engine
    first, second = words([GREEDY[0]]), words([GREEDY[1]])
    request = make_request(PROMPT, greedy(4, stop=(first[1:] + second + "no",)))
    engine.add(request)
    pieces = [engine.step().outputs[0].text for _ in range(3)]
    assert pieces == [first[0], "", first[1:] + second + words([GREEDY[2]])]
    engine.abort(request.id)
    engine.step()


def test_abort_in_the_middle_of_held_back_text_ends_quietly() -> None:
    engine = llm().engine
    request = make_request(PROMPT, greedy(20, stop=(words(GREEDY[:5]),)))
    engine.add(request)
    engine.step()
    engine.abort(request.id)
    (news,) = engine.step().outputs
    assert (news.finish_reason, news.text) == ("abort", "")


def test_the_detokenizer_alone() -> None:
    detokenizer = Detokenizer(loaded().tokenizer, ("w4w5", "5w6"))
    assert detokenizer.push(3) == ("w3", False)
    assert detokenizer.push(4) == ("", False)
    assert detokenizer.released == "w3"
    assert detokenizer.push(7) == ("w4w7", False)
    assert detokenizer.push(5) == ("w", False)
    assert detokenizer.push(6) == ("", True)
    assert detokenizer.released == "w3w4w7w"


def test_each_text_of_a_batch_ends_at_its_own_stop() -> None:
    engine = llm("recycling:k=20").engine
    requests = [make_request(PROMPT, greedy(24, stop=(words(GREEDY[i : i + 2]),))) for i in (3, 8, 15)]
    news = run(engine, requests)
    assert [text_of(news[r.id]) for r in requests] == [words(GREEDY[:i]) for i in (3, 8, 15)]
