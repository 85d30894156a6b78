"""Small networks that judge draft tokens, and the files they come in.

- `AcceptanceHead` (SpecDec++, 2405.19715): from the draft model's last hidden state, as it is after a drafted token was
  fed, the probability that this token is accepted if those before it were. D residual blocks x + SiLU(W x), each with
  weights of its own, then a linear layer to the two classes.
- `DecisionHead` (2409.10644): from entropy and the ten largest probabilities of the law that a token was drawn from.

A head's folder holds `head.safetensors`, whose header says what it is, what it fits, and a SHA-256 of its weights.
`paceline train acceptance-head` makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from paceline.errors import CorruptFileError, ModelNotFoundError, UnsupportedModelError

FORMAT = "paceline-head/1"
FILE = "head.safetensors"
TOP = 10
"""Probabilities that a decision head sees."""
_AGAIN = "Copy the file again, or make it again with `paceline train acceptance-head`."


class AcceptanceHead(nn.Module):
    """The head of SpecDec++.

    Args:
        hidden_size: of the draft model.
        blocks: residual blocks.
    """

    kind: ClassVar[str] = "acceptance"

    def __init__(self, hidden_size: int, blocks: int = 3) -> None:
        super().__init__()
        self.inputs = hidden_size
        layers = [nn.Linear(hidden_size, hidden_size) for _ in range(blocks)]
        for layer in layers:  # every block begins as the identity, whatever the scale of the states
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.blocks = nn.ModuleList(layers)
        self.classes = nn.Linear(hidden_size, 2)

    @property
    def shape(self) -> dict[str, int]:
        """What its constructor takes."""
        return {"hidden_size": self.inputs, "blocks": len(self.blocks)}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of rejection and acceptance.  # [n, hidden_size] -> [n, 2]"""
        for block in self.blocks:
            hidden = hidden + nn.functional.silu(block(hidden))
        return torch.log_softmax(self.classes(hidden), dim=-1)


class DecisionHead(nn.Module):
    """The decision model of improved multi-candidate decoding, 11 -> 44 -> 1."""

    kind: ClassVar[str] = "decision"

    def __init__(self) -> None:
        super().__init__()
        self.inputs = TOP + 1
        self.layers = nn.Sequential(nn.Linear(self.inputs, 44), nn.ReLU(), nn.Linear(44, 1))

    @property
    def shape(self) -> dict[str, int]:
        """What its constructor takes."""
        return {}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of rejection and acceptance.  # [n, 11] -> [n, 2]"""
        score = self.layers(features)
        return torch.cat([nn.functional.logsigmoid(-score), nn.functional.logsigmoid(score)], dim=-1)


Head = AcceptanceHead | DecisionHead
_KINDS: dict[str, type[AcceptanceHead] | type[DecisionHead]] = {c.kind: c for c in (AcceptanceHead, DecisionHead)}


def save_head(folder: Path, head: Head, about: dict[str, Any]) -> Path:
    """Write a head into a folder, whole or not at all; returns the file."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().float().contiguous().cpu() for name, value in head.state_dict().items()}
    facts = {"format": FORMAT, "kind": head.kind, "shape": head.shape, "sha256": _digest(tensors), "about": about}
    path = folder / FILE
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"facts": json.dumps(facts)})  # one entry: the library orders several at random
    part.chmod(0o644)  # the library makes files that only their owner can read
    os.replace(part, path)
    return path


def load_head(name: str, kind: str) -> Head:
    """Read a head.

    Args:
        name: its folder, or the file itself.
        kind: `acceptance` or `decision`.

    Raises:
        ModelNotFoundError: there is no such file.
        CorruptFileError: it is damaged, or something else.
        UnsupportedModelError: it is a head of another kind or format.
    """
    path = Path(name).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ModelNotFoundError(
            "there is no head.", field=str(path), fix="Give the folder that `paceline train acceptance-head` wrote."
        )
    tensors, facts = _read(path)
    if facts["kind"] != kind:
        flag = "" if kind == "acceptance" else f" --kind {kind}"
        raise UnsupportedModelError(
            f"is a head of kind {facts['kind']}, and {kind} is needed.",
            field=str(path),
            fix=f"Make one with `paceline train acceptance-head{flag}`.",
        )
    head = _KINDS[kind](**facts["shape"])
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise CorruptFileError("does not hold the weights it names.", field=str(path), fix=_AGAIN) from error
    return head.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            metadata = file.metadata() or {}
        facts = dict(json.loads(metadata["facts"]))
        version = facts["format"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CorruptFileError(f"is no head ({error}).", field=str(path), fix=_AGAIN) from error
    if version != FORMAT:
        raise UnsupportedModelError(f"has format {version!r}, and this version reads {FORMAT}.", field=str(path))
    if not {"kind", "shape", "sha256"} <= set(facts) or facts["sha256"] != _digest(tensors):
        raise CorruptFileError("is damaged: its checksum is another.", field=str(path), fix=_AGAIN)
    return tensors, facts


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
