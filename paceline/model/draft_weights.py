"""Draft models that borrow the target's embedding and head, and bring only layers of their own.

A draft made by `paceline train draft` is a folder with `config.json` (a `transformers` config with few layers),
`draft.json` (the manifest: which target it belongs to, how it was made, and size and SHA-256 of the other files, the
card excepted) and its layers and final norm as safetensors, in one file or several. Embedding and head are the target's
modules themselves, so a draft of 4 layers of SmolLM2-135M takes 28 MB and not 85, and on a CPU, where the engine has
packed the target's head already (`packed_linear.py`), both models use the one packed head.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from paceline.errors import CorruptFileError, ModelNotFoundError, UnsupportedModelError
from paceline.model import store
from paceline.model.builtin import ALIASES, BUILTIN_MODELS
from paceline.model.loader import LoadedModel

MANIFEST = "draft.json"
FORMAT = 1
"""Version of the folder's layout, `format` in the manifest."""
BUILTIN = "builtin"
"""The name of the draft that ships with a built-in target."""
_SHIPPED = Path(__file__).parent / "drafts"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "vocab.txt")
_AGAIN = "Copy the folder again, or make the draft again with `paceline train draft`."


def fingerprint(target: LoadedModel) -> dict[str, Any]:
    """What a draft shares with its target and cannot work without."""
    vocabulary = json.dumps(sorted(target.tokenizer.get_vocab().items()), ensure_ascii=True)
    return {
        "model_type": str(target.config.model_type),
        "hidden_size": int(target.config.hidden_size),
        "vocab_size": int(target.config.vocab_size),
        "tokenizer_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }


def public_name(target: LoadedModel) -> str:
    """What to call a target in a file that travels: its built-in name, or its name without this machine's folders."""
    name = ALIASES.get(target.name, target.name)
    if name not in BUILTIN_MODELS and (target.path / store.MARKER).is_file():
        marked = (store.read_marker(target.path) or {}).get("name")
        if marked in BUILTIN_MODELS:  # a built-in model given by its folder
            return str(marked)
    return Path(name).name if Path(name).is_absolute() else name


def is_draft(name: str) -> bool:
    """Whether `name` means a draft of this kind: `builtin`, or a folder with a manifest."""
    return name == BUILTIN or (Path(name).expanduser() / MANIFEST).is_file()


def check_is_draft_or_model(name: str) -> None:
    """Refuse a folder that is neither a draft of this kind nor a whole model, which may draft as well.

    Raises:
        ModelNotFoundError: it lacks the manifest of the one and the tokenizer of the other.
    """
    folder = Path(name).expanduser()
    if is_draft(name) or not folder.is_dir():
        return
    is_model = (folder / "config.json").is_file() and any((folder / file).is_file() for file in _TOKENIZER_FILES)
    if is_model or (folder / "adapter_config.json").is_file():  # what is wrong with an adapter, the loader says
        return
    raise ModelNotFoundError(
        f"is neither a draft (it has no {MANIFEST}) nor a model (it has no config.json with a tokenizer).",
        field=name,
        fix=_instead_of(folder),
    )


def ships(target: LoadedModel) -> bool:
    """Whether a draft of this target ships with Paceline."""
    own = public_name(target)
    return own in BUILTIN_MODELS and (_SHIPPED / own / MANIFEST).is_file()


def load_draft(name: str, target: LoadedModel) -> LoadedModel:
    """Load a draft on top of a loaded target.

    Args:
        name: a folder, or `builtin` for the draft that ships with a built-in target.
        target: the model it was made for; its embedding and head are shared, packed or not.

    Raises:
        ModelNotFoundError: no such folder, or no draft ships for this target.
        UnsupportedModelError: the draft was made for another target.
        CorruptFileError: a file of the folder is missing or damaged.
    """
    folder = _resolve(name, target)
    manifest = read_manifest(folder)
    _check_target(folder, manifest, target)
    _check_files(folder, manifest)
    config = _read_config(folder)
    tensors = _read_tensors(folder, manifest)
    model = build_on_target(config, target.model, dtype=target.dtype, device=target.device, attention="paceline")
    _fill(model, tensors, folder)
    return LoadedModel(
        name=name,
        path=folder,
        model=model.eval().requires_grad_(False),
        tokenizer=target.tokenizer,
        config=model.config,
        dtype=target.dtype,
        device=target.device,
        eos_token_ids=target.eos_token_ids,
        max_model_len=target.max_model_len,
        kept_kinds=target.kept_kinds,  # those of the head that both share
        rounds_inputs=target.rounds_inputs,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a draft's folder.

    Raises:
        CorruptFileError: it cannot be read.
        UnsupportedModelError: another version of Paceline wrote it.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        complete = bool(_weight_files(known)) and isinstance(manifest["target"], dict)
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError("is not the manifest of a draft.", field=str(path), fix=_AGAIN) from error
    if not complete:
        raise CorruptFileError("names no weight files.", field=str(path), fix=_AGAIN)
    if version != FORMAT:
        raise UnsupportedModelError(f"has format {version!r}, and this version reads {FORMAT}.", field=str(path))
    return dict(manifest)


def build_on_target(config: Any, target_model: Any, *, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
    """A `transformers` model of `config` with random layers; its embedding and head are the target's modules."""
    from transformers import AutoModelForCausalLM

    from paceline.model import attention as _attention  # noqa: F401  # registers "paceline"

    # A vocabulary of one: the embedding and head that the constructor makes are thrown away at once.
    small = copy.deepcopy(config)
    small.vocab_size, small.pad_token_id = 1, None
    model = AutoModelForCausalLM.from_config(small, attn_implementation=attention, dtype=dtype).to(device)
    model.set_input_embeddings(target_model.get_input_embeddings())
    model.set_output_embeddings(target_model.get_output_embeddings())
    for owner in (model, model.base_model):
        owner.config.vocab_size, owner.config.pad_token_id = config.vocab_size, config.pad_token_id
        if hasattr(owner, "vocab_size"):
            owner.vocab_size = config.vocab_size
    return model


def own_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are not the target's embedding or head, by name."""
    shared = (model.get_input_embeddings(), model.get_output_embeddings())
    foreign = {id(p) for module in shared for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in foreign}


def file_facts(path: Path) -> dict[str, Any]:
    """Size and digest of a file, as the manifest lists them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _resolve(name: str, target: LoadedModel) -> Path:
    if name == BUILTIN:
        return _shipped(target)
    folder = Path(name).expanduser()
    if (folder / MANIFEST).is_file():
        return folder
    if not folder.is_dir():
        raise ModelNotFoundError("no such draft folder.", field=name, fix="Make one with `paceline train draft`.")
    raise ModelNotFoundError(f"is a folder without {MANIFEST}.", field=name, fix=_instead_of(folder))


def _instead_of(folder: Path) -> str:
    """The way out for who gave a folder without a manifest."""
    inner = folder / "draft"
    if (inner / MANIFEST).is_file():
        return f"Give {inner}."
    return f"Copy all of a draft's folder ({MANIFEST}, config.json, weights), or make one with `paceline train draft`."


def _shipped(target: LoadedModel) -> Path:
    if ships(target):
        return _SHIPPED / public_name(target)
    there = sorted(path.parent.name for path in _SHIPPED.glob(f"*/{MANIFEST}"))
    raise ModelNotFoundError(
        f"no built-in draft ships for {target.name} (there is one for: {', '.join(there) or 'none'}).",
        field=BUILTIN,
        fix=f"Make one with `paceline train draft {target.name} --out RUN` and give RUN/draft.",
    )


def _check_target(folder: Path, manifest: dict[str, Any], target: LoadedModel) -> None:
    made_for = manifest["target"]
    for key, value in fingerprint(target).items():
        if made_for.get(key) != value:
            what = "has another tokenizer" if "tokenizer" in key else f"has {key} {value}, not {made_for.get(key)}"
            raise UnsupportedModelError(
                f"is a draft made for {made_for.get('name')}; {target.name} {what}.",
                field=str(folder),
                fix=f"Make one for it: `paceline train draft {target.name} --out RUN`.",
            )


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CorruptFileError("is missing.", field=str(path), fix=_AGAIN)
        if file_facts(path) != facts:
            raise CorruptFileError("is damaged: its size or SHA-256 is another.", field=str(path), fix=_AGAIN)


def _weight_files(files: Iterable[str]) -> list[str]:
    return [name for name in files if name.endswith(".safetensors")]


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # config classes validate with many exception types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CorruptFileError(f"cannot be read ({reason}).", field=str(folder / "config.json"), fix=_AGAIN) from error


def _read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for name in _weight_files(manifest["files"]):
        path = folder / name
        store.check_safetensors(path)
        tensors.update(load_file(path))
    return tensors


@torch.no_grad()
def _fill(model: Any, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    own = own_parameters(model)
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong = wrong or sorted(name for name, p in own.items() if p.shape != tensors[name].shape)
    if wrong:
        raise CorruptFileError(f"weights and config.json do not fit: {wrong[0]}.", field=str(folder), fix=_AGAIN)
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
