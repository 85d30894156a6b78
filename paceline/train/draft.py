"""`train draft`: the four stages in order, each going on from what an earlier run left.

RUN/
  run.json          the options that decide the result; another command in the same folder is refused
  text/             stage 1: shards of training text (several drafts can share one folder of them)
  checkpoints/      stages 2 and 3: the last two
  draft/            stage 4: the finished draft
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from paceline.errors import ConfigError
from paceline.model.draft_weights import fingerprint
from paceline.model.loader import LoadedModel
from paceline.train.checkpoint import has_checkpoint, load_checkpoint, remove_checkpoints, save_checkpoint
from paceline.train.distil import Distiller, DistilSettings, Measurement
from paceline.train.documents import Documents
from paceline.train.export import Provenance, export_draft
from paceline.train.interrupt import Interrupts
from paceline.train.run_folder import claim
from paceline.train.student import choose_layers, make_student
from paceline.train.write import WriteSettings, read_text, write_text


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """Everything that decides a draft."""

    distil: DistilSettings
    write: WriteSettings = field(default_factory=WriteSettings)
    tokens: int | None = None
    """Training text to have in all; None takes what is there."""
    layers: str = "4"
    intermediate: int | None = None
    eval_every: int = 100
    save_every: int = 500


@dataclass(frozen=True, slots=True)
class Events:
    """What a run tells while it goes on. `progress(stage, share)`: share of the stage that is done."""

    progress: Callable[[str, float], None] = lambda _stage, _share: None
    say: Callable[[str], None] = lambda _: None
    measured: Callable[[Measurement, float], None] = lambda _measurement, _loss: None
    """A measurement, and the mean training loss since the one before."""


def train_draft(
    target: LoadedModel,
    run: Path,
    settings: DraftSettings,
    *,
    text: Path | None = None,
    command: str = "",
    hardware: str = "",
    restart: bool = False,
    events: Events | None = None,
) -> Path:
    """Make a draft for `target`, going on from what is in `run`; returns the draft's folder.

    Raises:
        ConfigError: an option is impossible, or the folder holds a run with other options.
        CorruptFileError: a shard or checkpoint is damaged; names the file and says how to go on.
        KeyboardInterrupt: stopped by a signal, after a checkpoint.
    """
    events = events or Events()
    layers = choose_layers(settings.layers, int(target.config.num_hidden_layers))
    student = make_student(target, layers, intermediate=settings.intermediate, seed=settings.distil.seed)
    checkpoints = run / "checkpoints"
    if restart:
        remove_checkpoints(checkpoints)
        (run / "run.json").unlink(missing_ok=True)
    _claim(run, target, settings, layers)
    folder = text or run / "text"
    documents = _text(folder, target, settings, events)
    distiller = Distiller(target, student, documents, settings.distil)
    history = _train(distiller, checkpoints, settings, documents, events)
    facts = {
        "documents": len(documents.lengths),
        "tokens": len(documents.tokens),
        "own_tokens": int(documents.own.sum()),
        "heldout_documents": len(distiller.heldout.lengths),
        "settings": _written_with(folder),
    }
    how = Provenance(
        command=command,
        layers=layers,
        intermediate=settings.intermediate,
        text=facts,
        training=asdict(settings.distil),
        heldout=history[-1],
        history=history,
        hardware=hardware,
    )
    return export_draft(run / "draft", target, student, how)


def _text(folder: Path, target: LoadedModel, settings: DraftSettings, events: Events) -> Documents:
    if settings.tokens is None:
        return read_text(folder, target)
    wanted = settings.tokens
    return write_text(folder, target, settings.write, wanted, lambda n: events.progress("write", n / wanted))


def _train(
    distiller: Distiller, checkpoints: Path, settings: DraftSettings, documents: Documents, events: Events
) -> list[dict[str, Any]]:
    """Train to the end, with measurements and checkpoints; returns all measurements."""
    data = f"{len(documents.tokens)} tokens in {len(documents.lengths)} documents"
    history = _resume(distiller, checkpoints, data, events)

    def save() -> None:
        tensors, facts = distiller.state()
        save_checkpoint(checkpoints, distiller.step, tensors, {**facts, "data": data, "history": history})

    losses: list[torch.Tensor] = []

    def measure() -> None:
        measurement = distiller.measure()
        history.append(asdict(measurement))
        events.measured(measurement, float(torch.stack(losses).mean()) if losses else measurement.loss)
        losses.clear()

    if not history:
        measure()
    with Interrupts() as interrupts:
        while distiller.progress < 1.0:
            losses.append(distiller.train_step())
            events.progress("distil", distiller.progress)
            if distiller.step % settings.eval_every == 0:
                measure()
            if interrupts.requested:
                save()
                raise KeyboardInterrupt
            if distiller.step % settings.save_every == 0:
                save()
    if history[-1]["step"] != distiller.step:
        measure()
    save()
    return history


def _resume(distiller: Distiller, checkpoints: Path, data: str, events: Events) -> list[dict[str, Any]]:
    """Go on from the newest checkpoint; the measurements so far, none where there is none."""
    found = load_checkpoint(checkpoints)
    if found is None:
        return []
    tensors, facts = found
    if facts["data"] != data:
        raise ConfigError(
            f"was begun on {facts['data']}, and there are {data} now.",
            field=str(checkpoints),
            fix="Give the same text and --tokens to go on, or --restart to train anew.",
        )
    distiller.restore(tensors, facts)
    events.say(f"going on from step {distiller.step}")
    return list(facts["history"])


def _claim(run: Path, target: LoadedModel, settings: DraftSettings, layers: tuple[int, ...]) -> None:
    """Write the options down, or compare them with those of the run that is being gone on with."""
    if not has_checkpoint(run / "checkpoints"):  # nothing of another run would be mixed in
        (run / "run.json").unlink(missing_ok=True)
    kept = asdict(settings.distil)
    kept.pop("compile")  # changes the speed only
    claim(run, {"target": fingerprint(target), "layers": layers, "intermediate": settings.intermediate, **kept})


def _written_with(folder: Path) -> dict[str, Any]:
    about = json.loads((folder / "text.json").read_text(encoding="utf-8"))
    settings = dict(about.get("settings") or {})
    if settings.get("prompts"):
        settings["prompts"] = Path(settings["prompts"]).name
    return settings
