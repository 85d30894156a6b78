"""A real server over a tiny random model: real sockets, real uvicorn, a byte-level tokenizer with a chat template."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from fakes import make_config, make_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paceline.config import EngineConfig
from paceline.engine.builder import build_engine
from paceline.model.loader import LoadedModel
from paceline.server.config import ServerConfig
from paceline.server.run import DrainingServer, settings_of
from paceline.server.service import Service

WORDS = (" the", " and", "th", "he", "in", "er", "an", '":', '",', '{"', '"}', "ing", " a", "10", "tr", "fa", "nu")
END = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 512
MAX_LEN = 512


def make_byte_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges: every text can be written, some tokens are parts of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = list(word.replace(" ", "\u0120"))
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            merged = "".join(pair)
            if merged not in vocabulary:
                vocabulary[merged] = len(vocabulary)
                merges.append(pair)
            symbols = [merged, *symbols[2:]]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken(END, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    tokenizer.chat_template = template
    return tokenizer


def make_byte_loaded(seed: int = 0, template: str = TEMPLATE, **changes: Any) -> LoadedModel:
    """A random tiny Llama over that tokenizer."""
    tokenizer = make_byte_tokenizer(template)
    end = tokenizer.convert_tokens_to_ids(END)
    config = make_config("llama", VOCAB, **{"max_position_embeddings": MAX_LEN, "eos_token_id": end, **changes})
    return LoadedModel(
        name="tiny",
        path=Path("tiny"),
        model=make_model(config, seed),
        tokenizer=tokenizer,
        config=config,
        dtype=torch.float32,
        device=torch.device("cpu"),
        eos_token_ids=(end,),
        max_model_len=config.max_position_embeddings,
    )


def save_tiny(folder: Path) -> Path:
    """The same model as a checkpoint folder."""
    loaded = make_byte_loaded()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": loaded.eos_token_ids[0]}))
    return folder


class Running:
    """A server in a thread."""

    def __init__(self, service: Service, url: str, server: DrainingServer) -> None:
        self.service = service
        self.url = url
        self.server = server

    def client(self, **options: Any) -> httpx.Client:
        """A client of this server."""
        return httpx.Client(base_url=self.url, timeout=30.0, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """One JSON request."""
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """One GET request."""
        with self.client() as client:
            return client.get(path, **options)

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Wait until nothing runs, and check that every block is back."""
        blocks = self.service.engine.engine.stages.scheduler.blocks
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not (self.service.admission.open or self.service.engine.num_open or blocks.counts().used):
                return
            time.sleep(0.01)
        raise AssertionError(f"not idle: {self.service.admission.open} open, {blocks.counts()}")


@contextlib.contextmanager
def serving(
    loaded: LoadedModel | None = None, *, engine: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Running]:
    """A running server; at the end nothing may be left over."""
    options = {"speculation": "auto", "kv_cache_memory": 8 << 20, **(engine or {})}
    model = loaded or make_byte_loaded()
    config = ServerConfig(port=0, **settings)
    service = Service(model, build_engine(EngineConfig.from_options(options), model), config)
    server = DrainingServer(settings_of(service, config), service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Running(service, f"http://127.0.0.1:{port}", server)
    try:
        yield running
        running.wait_idle()
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a finished stream; the last line must be [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]", lines[-1]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
