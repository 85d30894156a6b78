"""Stage 1: the target writes the text that its draft will learn from.

A draft is accepted as often as it agrees with the target on text the *target* writes, so that is what it should see
(DistillSpec, 2310.08461). One shard is one batch of documents, all in step: every row is at the same position, given
tokens (prompts, chat framing) are fed to a row while others already draw theirs, so that nothing is padded and
attention needs no mask. Rows that end are dropped from the batch every few steps.

Shard i is a function of the settings and of i alone. An interrupted run therefore loses the shard in hand and nothing
else, and a deleted shard comes back as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from paceline.arrays import BoolArray
from paceline.errors import ConfigError, CorruptFileError
from paceline.model.draft_weights import fingerprint, public_name
from paceline.model.loader import LoadedModel
from paceline.train.attention import use_library_attention
from paceline.train.cache import cache_keyword, roomy_cache
from paceline.train.documents import Collection, Documents, clean, load_documents, load_shard, save_shard, shard_path
from paceline.train.prompts import Kind, OpeningRule, Script, file_scripts, own_scripts

ABOUT = "text.json"
_COMPACT_EVERY = 16
"""Steps between looks at which rows have ended: each look waits for the device."""
_OPENING_HEAT = 0.8
"""Temperature of users' turns and first words: varied, and still what somebody might ask."""
_BARREN = 3
"""Batches in a row without a new document after which writing gives up."""
_STRAGGLERS = 16
"""When fewer than 1 / this share of the rows is left, they are cut where they are."""


@dataclass(frozen=True, slots=True)
class WriteSettings:
    """What decides the text."""

    length: int = 512
    """Longest document in tokens."""
    batch: int = 512
    """Documents written at once."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Answers are written at these in turn."""
    turns: int = 2
    """Exchanges in one conversation that the target writes alone."""
    prompts: str | None = None
    """Prompt file instead of the target's own prompts."""
    seed: int = 0


Row = tuple[Script, float]
"""What to write, and the temperature of its answers."""
Progress = Callable[[int], None]
"""Called with the number of tokens there are so far."""


def write_text(
    folder: Path, target: LoadedModel, settings: WriteSettings, tokens: int, on_progress: Progress = lambda _: None
) -> Documents:
    """Write shards until there are `tokens` tokens, going on from those that are there; return all of them.

    Raises:
        ConfigError: the folder holds text of another target, or was begun with other settings.
        CorruptFileError: a shard is damaged; names the file.
        InputError: the prompt file cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder, target, settings, complete=_tokens_there(folder) >= tokens)
    scripts, rule = _scripts(target, settings)
    use_library_attention(target.model)
    kept = Collection()
    index, barren = 0, 0
    while kept.num_tokens < tokens:
        before = kept.num_tokens
        path = shard_path(folder, index)
        if not path.exists():
            writer = BatchWriter(target, _rows(scripts, settings, index), rule, settings, index)
            pairs = writer.run(lambda n, before=before: on_progress(min(before + n, tokens)))  # type: ignore[misc]
            save_shard(path, clean(pairs))
        kept.add_all(load_shard(path))
        barren = 0 if kept.num_tokens > before else barren + 1
        if barren == _BARREN:
            raise ConfigError(
                f"{_BARREN} batches in a row held no answer that was not there before.",
                field=str(folder),
                fix="Give more prompts (--prompts), more temperatures, longer documents (--length) or fewer --tokens.",
            )
        index += 1
        on_progress(min(kept.num_tokens, tokens))
    return kept.documents()


def read_text(folder: Path, target: LoadedModel) -> Documents:
    """All text of a folder that was written before, for this target.

    Raises:
        ConfigError: there is none, or it was written by another target.
        CorruptFileError: a shard is damaged; names the file.
    """
    shards = sorted(folder.glob("shard-*.safetensors"))
    if not shards:
        raise ConfigError("holds no training text.", field=str(folder), fix="Give --tokens N to have it written.")
    _check_folder(folder, target, None, complete=True)
    return load_documents(shards)


class BatchWriter:
    """Writes one batch of documents in step.

    Shapes: B rows still being written, K pieces of the longest script, S tokens of the longest given piece.
    """

    def __init__(
        self, target: LoadedModel, rows: Sequence[Row], rule: OpeningRule, settings: WriteSettings, index: int
    ) -> None:
        scripts = [script for script, _ in rows]
        self._model, self._device, self._rule = target.model, target.device, rule
        self._length = min(settings.length, target.max_model_len)
        stops = {*target.eos_token_ids, *(() if rule.closing is None else (rule.closing,))}
        self._stops = torch.tensor(sorted(stops), device=self._device)
        self._random = torch.Generator(self._device).manual_seed(settings.seed * 1_000_003 + index)
        size, pieces = len(scripts), max(len(s.kinds) for s in scripts) + 1
        widest = max(len(g) for s in scripts for g in s.given)
        kinds = np.full((size, pieces), Kind.END, dtype=np.int64)
        given = np.zeros((size, pieces, widest), dtype=np.int32)
        given_len = np.zeros((size, pieces), dtype=np.int64)
        for b, script in enumerate(scripts):
            kinds[b, : len(script.kinds)] = script.kinds
            given_len[b, : len(script.kinds)] = [len(g) for g in script.given]
            for k, ids in enumerate(script.given):
                given[b, k, : len(ids)] = ids
        self._common = min(int(given_len[:, 0].min()), self._length)
        self._kinds = torch.from_numpy(kinds).to(self._device)  # [B, K]
        self._given = torch.from_numpy(given).to(self._device)  # [B, K, S]
        self._given_len = torch.from_numpy(given_len).to(self._device)  # [B, K]
        self._heat = torch.tensor([heat for _, heat in rows], device=self._device)  # [B]
        self._rows = torch.arange(size, device=self._device)  # [B] row of `_out` that each belongs to
        self._piece = torch.zeros(size, dtype=torch.int64, device=self._device)  # [B] piece it is in
        self._place = torch.full((size,), self._common, device=self._device)  # [B] token within the piece
        self._alive = torch.ones(size, dtype=torch.bool, device=self._device)  # [B]
        self._out = torch.zeros((size, self._length), dtype=torch.int32, device=self._device)
        self._own = torch.zeros((size, self._length), dtype=torch.bool, device=self._device)
        self._lengths = torch.full((size,), self._length, device=self._device)

    @torch.inference_mode()
    def run(self, on_progress: Progress = lambda _: None) -> Iterator[tuple[NDArray[np.int32], BoolArray]]:
        """Write the batch; (tokens, own) of every document."""
        cache = roomy_cache(self._model.config, self._length)
        cached = {cache_keyword(self._model): cache}
        feed = self._given[:, 0, : self._common].long()
        self._out[:, : self._common] = feed.int()
        self._next_piece(self._place == self._given_len[:, 0])
        position = self._common
        for position in range(self._common, self._length):
            output = self._model(input_ids=feed, use_cache=True, logits_to_keep=1, **cached)
            feed = self._step(output.logits[:, -1].float(), position)[:, None]
            if position % _COMPACT_EVERY == 0:
                kept = torch.nonzero(self._alive)[:, 0]
                on_progress(int(self._lengths.clamp(max=position + 1).sum()))
                if len(kept) <= len(self._out) // _STRAGGLERS:
                    break
                if len(kept) < 0.9 * len(self._rows):
                    cache.batch_select_indices(kept)
                    feed = feed[kept]
                    self._compact(kept)
        lengths = self._lengths.clamp(max=position + 1).tolist()
        tokens, own = self._out.cpu().numpy(), self._own.cpu().numpy()
        return iter([(tokens[b, :n], own[b, :n]) for b, n in enumerate(lengths)])

    def _step(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        """Place every row's next token and move its script on.  # [B, vocab] -> [B]"""
        kind = self._kinds.gather(1, self._piece[:, None])[:, 0]
        opening, given = kind == Kind.OPENING, kind == Kind.GIVEN
        # No user's turn is empty.
        first = (opening & (self._place == 0))[:, None]
        logits[:, self._stops] = logits[:, self._stops].masked_fill(first, -torch.inf)
        drawn = self._draw(logits, torch.where(opening, _OPENING_HEAT, self._heat))
        ended = torch.isin(drawn, self._stops) | (opening & (self._place + 1 >= self._rule.longest))
        if self._rule.closing is not None:
            drawn = torch.where(opening & ended, self._rule.closing, drawn)
        place = self._place.clamp(max=self._given.shape[2] - 1)
        row = torch.arange(len(place), device=self._device)
        token = torch.where(given, self._given[row, self._piece, place].long(), drawn)
        ended = torch.where(given, self._place + 1 == self._given_len[row, self._piece], ended)
        self._out[self._rows, position] = token.int()
        self._own[self._rows, position] = kind == Kind.ANSWER
        self._place += 1
        self._next_piece(ended & self._alive)
        alive = self._kinds[row, self._piece] != Kind.END
        just_ended = self._alive & ~alive
        self._lengths[self._rows] = torch.where(just_ended, position + 1, self._lengths[self._rows])
        self._alive = alive
        return token

    def _draw(self, logits: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
        """Draw by the Gumbel-max trick; the likeliest where the temperature is 0.  # [B, vocab], [B] -> [B]"""
        noise = torch.empty_like(logits).exponential_(generator=self._random).log_().neg_()
        is_cold = (heat == 0)[:, None]
        scaled = logits / torch.where(is_cold, 1.0, heat[:, None])
        return (scaled + noise.masked_fill_(is_cold, 0.0)).argmax(dim=-1)

    def _next_piece(self, ended: torch.Tensor) -> None:
        self._piece = self._piece + ended.long()
        self._place = torch.where(ended, 0, self._place)

    def _compact(self, kept: torch.Tensor) -> None:
        for name in ("_kinds", "_given", "_given_len", "_heat", "_rows", "_piece", "_place", "_alive"):
            setattr(self, name, getattr(self, name)[kept])


def _rows(scripts: Sequence[Script], settings: WriteSettings, index: int) -> list[Row]:
    """Scripts in turn. Temperatures too, and a script that comes again meets the next one."""
    heats, rows = settings.temperatures, []
    for number in range(index * settings.batch, (index + 1) * settings.batch):
        turn, which = divmod(number, len(scripts))
        rows.append((scripts[which], heats[(turn + which) % len(heats)]))
    return rows


def _scripts(target: LoadedModel, settings: WriteSettings) -> tuple[list[Script], OpeningRule]:
    if settings.prompts is not None:
        scripts = file_scripts(Path(settings.prompts), target.tokenizer, target.eos_token_ids)
        fits = [s for s in scripts if len(s.given[0]) < settings.length]
        if not fits:
            raise ConfigError(
                f"no prompt is shorter than the documents' {settings.length} tokens.",
                field=settings.prompts,
                fix="Give a larger --length.",
            )
        return fits, OpeningRule(1, None)
    script, rule = own_scripts(target.tokenizer, target.eos_token_ids, turns=settings.turns)
    return [script], rule


def _tokens_there(folder: Path) -> int:
    return sum(len(load_shard(path).tokens) for path in sorted(folder.glob("shard-*.safetensors")))


def _check_folder(folder: Path, target: LoadedModel, settings: WriteSettings | None, *, complete: bool) -> None:
    """Text of another target must not be used, and text begun with other settings must not be gone on with."""
    path = folder / ABOUT
    about = {"target": {"name": public_name(target), **fingerprint(target)}, "settings": None}
    if settings is not None:
        about["settings"] = json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(about, indent=1), encoding="utf-8")
        os.replace(part, path)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs, other = dict(found["target"]), found["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "Delete it if the shards beside it are of this target; it is then written again."
        raise CorruptFileError("is damaged.", field=str(path), fix=fix) from error
    if any(theirs.get(key) != value for key, value in fingerprint(target).items()):
        raise ConfigError(
            f"holds text written by {theirs.get('name')}, which is another model.",
            field=str(folder),
            fix="Give another folder.",
        )
    if settings is not None and not complete and other != about["settings"]:
        changed = [key for key in about["settings"] or {} if (other or {}).get(key) != (about["settings"] or {})[key]]
        raise ConfigError(
            f"was begun with another {', '.join(changed)}.",
            field=str(folder),
            fix="Give the same options to go on, or another folder to begin anew.",
        )
