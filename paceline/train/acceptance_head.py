"""`train acceptance-head`: the stages in order, each going on from what an earlier run left.

RUN/
  run.json          the options that decide the result; another command in the same folder is refused
  text/             stage 1: what the target wrote (`train draft` writes the same; they can share a folder)
  labels/           stage 2: draft tokens and how likely the target accepts them (`judgements.py`)
  checkpoints/      stage 3: the last two
  head/             stage 4: the finished head and its card

The loss of SpecDec++ (2405.19715) over places with label a and judgement b:

    - sum(a log b + w (1 - a) log(1 - b)) / sum(a + w (1 - a))

where w makes rejections, which are rarer, count more. Its head is trained with w = 6 for 3 epochs, the draft is frozen.
The decision model of 2409.10644 learns with plain cross-entropy (w = 1).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.arrays import FloatArray
from paceline.errors import ConfigError, UnsupportedModelError
from paceline.model.draft_weights import check_is_draft_or_model, fingerprint, is_draft, load_draft, public_name
from paceline.model.loader import LoadedModel, load_model
from paceline.plan.heads import AcceptanceHead, DecisionHead, Head, save_head
from paceline.train.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint
from paceline.train.documents import Documents
from paceline.train.interrupt import Interrupts
from paceline.train.judgements import Judge, Judgements
from paceline.train.run_folder import claim
from paceline.train.write import WriteSettings, read_text, write_text

KINDS = ("acceptance", "decision")


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """Everything that decides a head."""

    kind: str = "acceptance"
    blocks: int = 3
    """Residual blocks of an acceptance head."""
    epochs: int = 3
    batch: int = 256
    """Places of an optimiser step."""
    learning_rate: float = 1e-3
    rejection_weight: float = 6.0
    mixing: float = 0.15
    """Share of the target's own tokens in what the draft reads."""
    heldout: float = 0.1
    """Share of the documents kept for measuring."""
    seed: int = 0
    tokens: int | None = None
    """Training text to have in all; None takes what is there."""
    write: WriteSettings = field(default_factory=WriteSettings)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"is {self.kind!r}.", field="kind", fix=f"Give one of {', '.join(KINDS)}.")


@dataclass(frozen=True, slots=True)
class HeadMeasurement:
    """What a head is worth on held-out text."""

    epoch: int
    loss: float
    auc: float
    """Probability that an accepted token is judged better than a rejected one."""
    places: int


@dataclass(frozen=True, slots=True)
class Events:
    """What a run tells while it goes on. `progress(stage, share)`: share of the stage that is done."""

    progress: Callable[[str, float], None] = lambda _stage, _share: None
    say: Callable[[str], None] = lambda _: None


def auc(judged: FloatArray, accepted: FloatArray) -> float:
    """Area under the ROC curve, where place i is an accepted token with weight `accepted[i]` and a rejected one with
    the rest; equal judgements count half.  # [N], [N]"""
    values, place = np.unique(judged, return_inverse=True)
    good = np.bincount(place, accepted, minlength=len(values))
    bad = np.bincount(place, 1.0 - accepted, minlength=len(values))
    below = np.cumsum(bad) - bad
    total = good.sum() * bad.sum()
    return float((good * (below + 0.5 * bad)).sum() / total) if total > 0.0 else float("nan")


def head_loss(log_judged: torch.Tensor, accepted: torch.Tensor, rejection_weight: float) -> torch.Tensor:
    """The weighted cross-entropy above.  # [N, 2], [N] -> []"""
    rejected = rejection_weight * (1.0 - accepted)
    total = -(accepted * log_judged[:, 1] + rejected * log_judged[:, 0]).sum()
    return total / (accepted + rejected).sum().clamp(min=1e-9)


class HeadTrainer:
    """Trains a head on judged places; `state` and `restore` carry it over an interruption.

    Args:
        judgements: of all documents, some of which are held out.
        settings: how to train.
        device: where to.
    """

    def __init__(self, judgements: Judgements, settings: HeadSettings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        documents = torch.unique(judgements.document).numpy()
        if len(documents) < 2:
            raise ConfigError("training needs two documents at least.", field="text", fix="Raise --tokens.")
        order = np.random.default_rng(settings.seed).permutation(documents)
        held = order[: max(1, round(len(order) * settings.heldout))]
        is_held = torch.isin(judgements.document, torch.from_numpy(held))
        self._training, self._heldout = (
            (judgements.inputs[mask].to(device), judgements.accepted[mask].to(device)) for mask in (~is_held, is_held)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.head = make_head(settings, judgements.inputs.shape[1]).to(device)
        self._parameters = dict(self.head.named_parameters())
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=settings.learning_rate, weight_decay=0.01)
        self._per_epoch = -(-len(self._training[1]) // settings.batch)
        self.step = 0

    @property
    def progress(self) -> float:
        """Share of the training that is done."""
        return self.step / (self._per_epoch * self._settings.epochs)

    @property
    def epoch(self) -> int:
        """Whole epochs that are done."""
        return self.step // self._per_epoch

    def train_step(self) -> None:
        """One optimiser step. Its places are a function of the seed and the step."""
        epoch, place = divmod(self.step, self._per_epoch)
        order = np.random.default_rng((self._settings.seed, epoch)).permutation(len(self._training[1]))
        which = torch.from_numpy(order[place * self._settings.batch :][: self._settings.batch]).to(self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * 0.5 * (1.0 + np.cos(np.pi * self.progress))
        inputs, accepted = (part[which].float() for part in self._training)
        self._optimizer.zero_grad(set_to_none=True)
        head_loss(self.head(inputs), accepted, self._settings.rejection_weight).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.step += 1

    @torch.no_grad()
    def measure(self) -> HeadMeasurement:
        """Loss and AUC on the held-out places."""
        inputs, accepted = self._heldout
        judged = torch.cat([self.head(part.float()) for part in torch.split(inputs, 4096)])
        loss = head_loss(judged, accepted, self._settings.rejection_weight)
        found = auc(judged[:, 1].double().cpu().numpy(), accepted.double().cpu().numpy())
        return HeadMeasurement(self.epoch, float(loss), found, len(accepted))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything a later process needs: tensors and facts."""
        tensors = {f"weight/{name}": p.detach() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            for key, value in self._optimizer.state[p].items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value).detach()
        return tensors, {"step": self.step}

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Go on from `state`."""
        moments = {}
        for i, (name, parameter) in enumerate(self._parameters.items()):
            parameter.copy_(tensors[f"weight/{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
            moments[i] = {key: tensors[f"{key}/{name}"] for key in keys}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step = int(facts["step"])


def make_head(settings: HeadSettings, inputs: int) -> Head:
    """An untrained head."""
    return DecisionHead() if settings.kind == "decision" else AcceptanceHead(inputs, settings.blocks)


def open_draft(name: str, target: LoadedModel) -> LoadedModel:
    """The draft model of a spec: one made for the target, or any model with its tokenizer.

    Raises:
        ModelNotFoundError: it is neither.
        UnsupportedModelError: it has another tokenizer.
    """
    check_is_draft_or_model(name)
    if is_draft(name):
        return load_draft(name, target)
    kind = "float32" if target.dtype == torch.float32 else "bfloat16"
    draft = load_model(name, dtype=kind, device=str(target.device))
    if draft.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise UnsupportedModelError("has another tokenizer than the target.", field=name)
    return draft


def train_acceptance_head(
    target: LoadedModel,
    draft: LoadedModel,
    run: Path,
    settings: HeadSettings,
    *,
    text: Path | None = None,
    command: str = "",
    hardware: str = "",
    restart: bool = False,
    events: Events | None = None,
) -> Path:
    """Make a head for a target and its draft, going on from what is in `run`; returns the head's folder.

    Raises:
        ConfigError: an option is impossible, or the folder holds a run with other options.
        CorruptFileError: a file is damaged; names it and says how to go on.
        KeyboardInterrupt: stopped by a signal, after a checkpoint.
    """
    events = events or Events()
    if restart:
        remove_checkpoints(run / "checkpoints")
        shutil.rmtree(run / "labels", ignore_errors=True)
        (run / "run.json").unlink(missing_ok=True)
    options = {key: value for key, value in asdict(settings).items() if key not in ("tokens", "write")}
    claim(run, {"target": fingerprint(target), "draft": _draft_facts(draft), **options})
    documents = _text(text or run / "text", target, settings, events)
    judge = Judge(target, draft, kind=settings.kind, mixing=settings.mixing, seed=settings.seed)
    labels = run / "labels"
    _check_documents(run, documents)
    judgements = judge.judge(labels, documents, lambda share: events.progress("label", share))
    trainer = HeadTrainer(judgements, settings, target.device)
    history = _train(trainer, run / "checkpoints", settings, events)
    about = {
        "target": public_name(target),
        "draft": _draft_facts(draft),
        "settings": options,
        "documents": len(documents.lengths),
        "places": len(judgements.accepted),
        "acceptance": float(judgements.accepted.mean()),
        "history": history,
        "command": command,
        "hardware": hardware,
    }
    return _export(run / "head", trainer.head, about)


def _text(folder: Path, target: LoadedModel, settings: HeadSettings, events: Events) -> Documents:
    if settings.tokens is None:
        return read_text(folder, target)
    wanted = settings.tokens
    return write_text(folder, target, settings.write, wanted, lambda n: events.progress("write", n / wanted))


def _check_documents(run: Path, documents: Documents) -> None:
    """Labels are of the text they were made from."""
    claim(run / "labels", {"documents": len(documents.lengths), "tokens": len(documents.tokens)})


def _draft_facts(draft: LoadedModel) -> dict[str, Any]:
    return {
        "name": public_name(draft),
        "layers": int(draft.config.num_hidden_layers),
        "hidden_size": int(draft.config.hidden_size),
    }


def _train(trainer: HeadTrainer, checkpoints: Path, settings: HeadSettings, events: Events) -> list[dict[str, Any]]:
    """Train to the end, with a measurement and a checkpoint after every epoch; returns all measurements."""
    history: list[dict[str, Any]] = []
    found = load_checkpoint(checkpoints)
    if found is not None:
        trainer.restore(*found)
        history = list(found[1]["history"])
        events.say(f"going on from step {trainer.step}")

    def measure() -> None:
        m = trainer.measure()
        history.append(asdict(m))
        events.say(f"epoch {m.epoch} of {settings.epochs}  held out: loss {m.loss:.3f}, AUC {m.auc:.3f} ({m.places})")

    def save() -> None:
        tensors, facts = trainer.state()
        save_checkpoint(checkpoints, trainer.step, tensors, {**facts, "history": history})

    if not history:
        measure()
    with Interrupts() as interrupts:
        while trainer.progress < 1.0:
            before = trainer.epoch
            trainer.train_step()
            events.progress("train", trainer.progress)
            if trainer.epoch > before:
                measure()
            if interrupts.requested or trainer.epoch > before:
                save()
            if interrupts.requested:
                raise KeyboardInterrupt
    return history


def _export(folder: Path, head: Head, about: dict[str, Any]) -> Path:
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_head(part, head, about)
    (part / "README.md").write_text(card(head, about), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


def card(head: Head, about: dict[str, Any]) -> str:
    """The head's card."""
    settings, last = about["settings"], about["history"][-1]
    policy = "decision" if head.kind == "decision" else "specdec++"
    rows = "\n".join(f"| {m['epoch']} | {m['loss']:.3f} | {m['auc']:.3f} |" for m in about["history"])
    return f"""\
# {head.kind.capitalize()} head for {about["draft"]["name"]}, draft of {about["target"]}

Says how likely a draft token is to be accepted: `--speculation draft:model=DRAFT@{policy}:head=FOLDER`. It fits
drafts with hidden states of size {about["draft"]["hidden_size"]}; it was made for one of {about["draft"]["layers"]}
layers.
{sum(p.numel() for p in head.parameters()):,} parameters.

- command: `{about["command"]}`
- hardware: {about["hardware"]}
- data: {about["places"]:,} draft tokens at places of {about["documents"]:,} documents that the target wrote; mean
  acceptance {about["acceptance"]:.3f} at temperature 1
- training: {settings["epochs"]} epochs, {settings["batch"]} tokens a step, learning rate {settings["learning_rate"]},
  rejections weigh {settings["rejection_weight"]}, mixing {settings["mixing"]}, seed {settings["seed"]}
- held out ({last["places"]:,} tokens of other documents): AUC {last["auc"]:.3f}

| epoch | held-out loss | AUC |
|---:|---:|---:|
{rows}
"""
