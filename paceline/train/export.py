"""Stage 4: a folder with the draft's own tensors, its manifest and its card."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paceline.model.draft_weights import FORMAT, MANIFEST, file_facts, fingerprint, own_parameters, public_name
from paceline.model.loader import LoadedModel

_FILE_BYTES = 14 << 20
"""Weights are split into files of at most this size (a single larger tensor excepted)."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a draft was made."""

    command: str
    layers: tuple[int, ...]
    intermediate: int | None
    text: dict[str, Any]
    """Counts and settings of the training text."""
    training: dict[str, Any]
    heldout: dict[str, Any]
    """The last measurement."""
    history: list[dict[str, Any]]
    hardware: str


def export_draft(folder: Path, target: LoadedModel, student: Any, how: Provenance) -> Path:
    """Write the draft's folder, replacing an older export; returns it."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {name: p.detach().to(torch.bfloat16).contiguous().cpu() for name, p in own_parameters(student).items()}
    files = _save_split(part, tensors)
    config = student.config
    config.architectures = [type(student).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(part)
    files["config.json"] = file_facts(part / "config.json")
    manifest = {
        "format": FORMAT,
        "target": {
            "name": public_name(target),
            "num_hidden_layers": int(target.config.num_hidden_layers),
            **fingerprint(target),
        },
        "layers": list(how.layers),
        "intermediate_size": how.intermediate,
        "parameters": sum(t.numel() for t in tensors.values()),
        "files": files,
        "text": how.text,
        "training": how.training,
        "heldout": how.heldout,
        "history": how.history,
        "command": how.command,
        "hardware": how.hardware,
    }
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    (part / "README.md").write_text(card(manifest), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return folder


def card(manifest: dict[str, Any]) -> str:
    """The model card."""
    target, text, held = manifest["target"], manifest["text"], manifest["heldout"]
    wide = f", MLPs widened to {manifest['intermediate_size']}" if manifest["intermediate_size"] else ""
    size = sum(f["bytes"] for name, f in manifest["files"].items() if name.endswith(".safetensors")) / 1e6
    rows = "\n".join(
        f"| {m['step']} | {m['tokens']:,} | {m['loss']:.3f} | {m['acceptance']:.3f} | {m['agreement']:.3f} |"
        for m in _thinned(manifest["history"])
    )
    return f"""\
# Draft model for {target["name"]}

Layers {", ".join(map(str, manifest["layers"]))} of the target's {target["num_hidden_layers"]}{wide}, trained to predict
the target's next-token law on text that the target wrote. {manifest["parameters"]:,} parameters of its own
({size:.1f} MB in bfloat16); embedding and head are the target's and not in this folder. It works with that target
only: `--speculation draft:model=FOLDER`.

- command: `{manifest["command"]}`
- hardware: {manifest["hardware"]}
- text: {text["documents"]:,} documents, {text["tokens"]:,} tokens, of which {text["own_tokens"]:,} are the target's
  answers; {_prompts(text)}
- training: {held["step"]:,} steps, {held["tokens"]:,} tokens (repetitions counted), {held["seconds"]:.0f} s
- held out ({text["heldout_documents"]:,} documents, never trained on): acceptance {held["acceptance"]:.3f} at
  temperature 1 (mean of sum min(p, q) where the target answers), {held["agreement"]:.3f} at temperature 0 (same
  likeliest token)

| step | tokens | held-out loss | acceptance at T=1 | at T=0 |
|---:|---:|---:|---:|---:|
{rows}
"""


def _prompts(text: dict[str, Any]) -> str:
    given = text["settings"].get("prompts")
    return f"prompts from {Path(given).name}" if given else "prompts written by the target as well"


def _thinned(history: list[dict[str, Any]], most: int = 12) -> list[dict[str, Any]]:
    if len(history) <= most:
        return history
    return [history[round(i * (len(history) - 1) / (most - 1))] for i in range(most)]


def _save_split(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write tensors in files of bounded size; returns the files' facts by name."""
    from safetensors.torch import save_file

    groups: list[dict[str, torch.Tensor]] = [{}]
    room = _FILE_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and groups[-1]:
            groups.append({})
            room = _FILE_BYTES
        groups[-1][name] = tensor
        room -= size
    files = {}
    for i, group in enumerate(groups, 1):
        path = folder / f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes files that only their owner can read
        files[path.name] = file_facts(path)
    return files
