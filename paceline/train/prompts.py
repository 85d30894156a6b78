"""What the target is given to write on: scripts, in which given tokens alternate with what it writes itself.

Without a prompt file a chat model also writes the user's turns: the chat template is fed up to the beginning of a user
turn and the model goes on (the idea of Magpie, 2406.08464). A base model starts from its begin-of-text token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from paceline.errors import InputError, UnsupportedModelError

_MARKS = ("FIRSTUSERTURN", "ASSISTANTTURN", "SECONDUSERTURN")
_BASE_OPENING = 12
_CHAT_OPENING = 96


class Kind(IntEnum):
    """What a piece of a script is."""

    GIVEN = 0
    """Tokens that are fed as they are."""
    OPENING = 1
    """Written by the target: a user's turn, or the first words of a text."""
    ANSWER = 2
    """Written by the target at the row's temperature until it ends."""
    END = 3


@dataclass(frozen=True, slots=True)
class Script:
    """The pieces of one document; it starts with a GIVEN one. `given` is empty for pieces that are written."""

    kinds: tuple[Kind, ...]
    given: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class OpeningRule:
    """How an OPENING ends."""

    longest: int
    """In tokens."""
    closing: int | None
    """The token that then stands there (a chat template's end of turn); None keeps what was drawn."""


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """The token ids a chat template puts around turns."""

    before_user: tuple[int, ...]
    after_user: tuple[int, ...]
    """End of turn and generation prompt."""
    between: tuple[int, ...]
    """From the end of an answer to the next user turn."""


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """Read the frame off the chat template; None for a model without one.

    Raises:
        UnsupportedModelError: the template does not render a plain conversation.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs and fail in their own ways
        raise _bad_template(str(error)) from error
    if any(text.count(mark) != 1 for mark in _MARKS):
        raise _bad_template("a turn is missing from what it renders")
    before, rest = text.split(_MARKS[0])
    between, after = rest.split(_MARKS[1])[1].split(_MARKS[2])
    parts = [tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after, between)]
    if not parts[0] or not parts[1]:
        raise _bad_template("nothing marks the turns")
    return ChatFrame(*parts)


def own_scripts(tokenizer: Any, stops: Sequence[int], *, turns: int) -> tuple[Script, OpeningRule]:
    """The script for text that the target writes alone, `turns` exchanges long, and how its openings end."""
    frame = chat_frame(tokenizer)
    if frame is None:
        start = _first_token(tokenizer)
        return Script((Kind.GIVEN, Kind.OPENING, Kind.ANSWER), ((start,), (), ())), OpeningRule(_BASE_OPENING, None)
    kinds: list[Kind] = []
    given: list[tuple[int, ...]] = []
    for turn in range(turns):
        kinds += [Kind.GIVEN, Kind.OPENING, Kind.GIVEN, Kind.ANSWER]
        before = frame.before_user if turn == 0 else _after_answer(frame, stops)
        # The closing token of the user's turn is written when the opening ends.
        given += [before, (), frame.after_user[1:], ()]
    return _without_empty(kinds, given), OpeningRule(_CHAT_OPENING, frame.after_user[0])


def file_scripts(path: Path, tokenizer: Any, stops: Sequence[int]) -> list[Script]:
    """A script for every prompt of a file.

    Args:
        path: JSONL with `prompt` (text) or `turns` (list of texts) on each line, or one plain-text prompt a line.

    Raises:
        InputError: the file cannot be read, or a line is neither.
    """
    frame = chat_frame(tokenizer)
    scripts = []
    for turns in read_prompts(path):
        if frame is None:
            ids = tokenizer.encode(turns[0]) or [_first_token(tokenizer)]
            scripts.append(Script((Kind.GIVEN, Kind.ANSWER), (tuple(ids), ())))
            continue
        kinds: list[Kind] = []
        given: list[tuple[int, ...]] = []
        for i, turn in enumerate(turns):
            before = frame.before_user if i == 0 else _after_answer(frame, stops)
            text = tuple(tokenizer.encode(turn, add_special_tokens=False))
            kinds += [Kind.GIVEN, Kind.ANSWER]
            given += [(*before, *text, *frame.after_user), ()]
        scripts.append(Script(tuple(kinds), tuple(given)))
    return scripts


def read_prompts(path: Path) -> list[list[str]]:
    """The turns of every prompt of a file; see `file_scripts`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error}).", field=str(path)) from error
    filled = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise InputError("has no prompts.", field=str(path), fix="Write one prompt a line, as JSON or plain text.")
    if not filled[0][1].lstrip().startswith("{"):
        return [[line.strip()] for _, line in filled]
    return [_turns(line, f"{path}, line {i}") for i, line in filled]


def _turns(line: str, where: str) -> list[str]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"is not JSON ({error}).", field=where) from error
    found = entry.get("turns", entry.get("prompt")) if isinstance(entry, dict) else None
    turns = [found] if isinstance(found, str) else found
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise InputError('has neither "prompt" (text) nor "turns" (list of texts).', field=where)
    return turns


def _after_answer(frame: ChatFrame, stops: Sequence[int]) -> tuple[int, ...]:
    """The answer's end token is written by the target itself."""
    return frame.between[1:] if frame.between and frame.between[0] in stops else frame.between


def _without_empty(kinds: Sequence[Kind], given: Sequence[tuple[int, ...]]) -> Script:
    kept = [(k, g) for k, g in zip(kinds, given, strict=True) if g or k != Kind.GIVEN]
    return Script(tuple(k for k, _ in kept), tuple(g for _, g in kept))


def _first_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UnsupportedModelError("has no token that begins a text.", field="tokenizer", fix="Give --prompts FILE.")


def _bad_template(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"cannot be used to write conversations ({why}).", field="chat template")
