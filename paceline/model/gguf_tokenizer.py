"""Rebuild a Hugging Face tokenizer from `tokenizer.ggml.*` metadata.

Only byte-level BPE vocabularies (`tokenizer.ggml.model` is `gpt2`) with a known pre-tokenizer are rebuilt. A
text split in another way than in training still decodes, and quietly gives worse answers, so an unknown
pre-tokenizer is refused. SentencePiece vocabularies are refused too: their files do not say how spaces are
normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from paceline.errors import CorruptFileError, UnsupportedModelError
from paceline.model.gguf_reader import scalar

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclass(frozen=True, slots=True)
class _Pre:
    """How text is split before merges apply."""

    pattern: str | None = None
    """Split pattern; None is GPT-2's own, which `ByteLevel` has built in."""
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    """Take a whole piece that is in the vocabulary even if no merges lead to it."""
    add_bos: bool = False
    """What an absent `add_bos_token` means."""


_PRE = {
    "gpt-2": _Pre(),
    "smollm": _Pre(single_digits=True),
    "qwen2": _Pre(_QWEN2, nfc=True),
    "llama-bpe": _Pre(_LLAMA3, ignore_merges=True, add_bos=True),
}


def save_tokenizer(metadata: dict[str, Any], folder: Path, file: Path) -> list[int]:
    """Write `tokenizer.json` and `tokenizer_config.json` (and the chat template, if any) for `AutoTokenizer`.

    Args:
        metadata: the GGUF file's metadata.
        folder: where to write.
        file: the GGUF file, for error messages.

    Returns:
        The ids that end a text: end of sequence first, then end of turn; empty if the file names none.

    Raises:
        UnsupportedModelError: a vocabulary type or pre-tokenizer that is not supported.
        CorruptFileError: the vocabulary contradicts itself.
    """
    from transformers import PreTrainedTokenizerFast

    reader = _Vocabulary(metadata, file)
    options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = reader.special(key)
        if token is not None:
            options[f"{name}_token"] = token
    options.setdefault("pad_token", options.get("eos_token"))
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        options["chat_template"] = template
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader.build(), **options)
    tokenizer.save_pretrained(folder)
    ends = [reader.special("eos"), reader.special("eot"), *(t for t in END_OF_TURN if t in reader.control)]
    return list(dict.fromkeys(reader.ids[token] for token in ends if token is not None))


class _Vocabulary:
    """The vocabulary of one file, checked."""

    def __init__(self, metadata: dict[str, Any], file: Path) -> None:
        self._metadata = metadata
        self._file = file
        kind = scalar(metadata, "tokenizer.ggml.model", None, file)
        if kind != "gpt2":
            raise UnsupportedModelError(
                f"has a tokenizer of type {kind!r}; only byte-level BPE ('gpt2') is rebuilt from GGUF files.",
                field=str(file),
                fix="Use the model's safetensors checkpoint, which has its tokenizer.json.",
            )
        name = scalar(metadata, "tokenizer.ggml.pre", None, file)
        if name not in _PRE:
            raise UnsupportedModelError(
                f"has the pre-tokenizer {name!r}; supported are {', '.join(_PRE)}.", field=str(file)
            )
        # `AutoTokenizer` gives every qwen2 model that model's own splitting, whatever the files say.
        if metadata.get("general.architecture") == "qwen2" and name != "qwen2":
            raise UnsupportedModelError(
                f"is a qwen2 model with the pre-tokenizer {name!r}, which would not be kept.", field=str(file)
            )
        self._pre = _PRE[name]
        tokens = self._strings("tokens")
        self.ids = {token: index for index, token in enumerate(tokens)}
        if len(self.ids) != len(tokens):
            self._corrupt("a token appears twice in its vocabulary")
        kinds = self._kinds(len(tokens))
        self._tokens = tokens
        self._user_defined = [t for t, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
        self._unused = {t for t, kind in zip(tokens, kinds, strict=True) if kind == UNUSED}
        self.control = {t: None for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL}

    def special(self, key: str) -> str | None:
        """The token that `tokenizer.ggml.<key>_token_id` points at."""
        index = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(self._tokens):
            self._corrupt(f"its {key} token id is {index!r}, outside the vocabulary")
        return self._tokens[index]

    def build(self) -> Tokenizer:
        """The tokenizer, with added tokens and the begin/end tokens it puts around a text."""
        vocab = {token: index for token, index in self.ids.items() if token not in self._unused}
        tokenizer = Tokenizer(models.BPE(vocab, self._merges(vocab), ignore_merges=self._pre.ignore_merges))
        if self._pre.nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = self._splitter()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in self.control if t])
        # Not special: `skip_special_tokens` must keep them (`<think>`, `<tool_call>`), but never cut up.
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in self._user_defined if t])
        around = self._around()
        if around is not None:
            tokenizer.post_processor = around
        return tokenizer

    def _splitter(self) -> Any:
        if self._pre.pattern is not None:
            split = pre_tokenizers.Split(Regex(self._pre.pattern), behavior="isolated")
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if not self._pre.single_digits:
            return byte_level
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])

    def _around(self) -> Any:
        bos = self.special("bos") if self._adds("bos", self._pre.add_bos) else None
        eos = self.special("eos") if self._adds("eos", False) else None
        if bos is None and eos is None:
            return None
        # The template names special tokens by place, since a token's own text may hold template characters.
        pieces = [*(["BOS:0"] if bos is not None else []), "$A:0", *(["EOS:0"] if eos is not None else [])]
        second = [piece.replace(":0", ":1").replace("$A", "$B") for piece in pieces]
        table = [
            {"id": place, "ids": [self.ids[token]], "tokens": [token]}
            for place, token in (("BOS", bos), ("EOS", eos))
            if token is not None
        ]
        return processors.TemplateProcessing(
            single=" ".join(pieces), pair=" ".join(pieces + second), special_tokens=table
        )

    def _adds(self, key: str, default: bool) -> bool:
        """Whether the tokenizer puts this token around a text."""
        return bool(scalar(self._metadata, f"tokenizer.ggml.add_{key}_token", default, self._file))

    def _merges(self, vocab: dict[str, int]) -> list[tuple[str, str]]:
        merges = []
        for line in self._strings("merges"):
            # The first part may itself begin with a space, hence the search from the second character.
            cut = line.find(" ", 1)
            left, right = line[:cut], line[cut + 1 :]
            if cut < 0 or left not in vocab or right not in vocab or left + right not in vocab:
                self._corrupt(f"its merge {line!r} uses tokens that are not in the vocabulary")
            merges.append((left, right))
        return merges

    def _strings(self, key: str) -> list[str]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not value:
            self._corrupt(f"it has no tokenizer.ggml.{key}")
        return value

    def _kinds(self, count: int) -> Sequence[int]:
        value = self._metadata.get("tokenizer.ggml.token_type")
        if value is None:
            return [1] * count
        if getattr(value, "shape", None) != (count,) or value.dtype.kind not in "iu":
            self._corrupt("tokenizer.ggml.token_type does not match its vocabulary")
        kinds: list[int] = value.tolist()
        return kinds

    def _corrupt(self, what: str) -> NoReturn:
        raise CorruptFileError(f"is not a valid GGUF model: {what}.", field=str(self._file))
