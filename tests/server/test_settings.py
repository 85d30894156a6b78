"""Settings of `paceline serve`: flags before environment before file, and every mistake named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline.cli.main import main, parse_args
from paceline.cli.serve import gather, read_environment, split
from paceline.errors import ConfigError
from paceline.server.config import ServerConfig


def settings(*flags: str, **environment: str) -> dict[str, Any]:
    """What `gather` finds."""
    return gather(parse_args(["serve", *flags]), {f"PACELINE_{name}": value for name, value in environment.items()})


def written(tmp_path: Path, text: str) -> str:
    """A config file."""
    path = tmp_path / "paceline.toml"
    path.write_text(text)
    return str(path)


def test_precedence(tmp_path: Path) -> None:
    """A flag wins over the environment, the environment over the file, each over the default."""
    path = written(tmp_path, 'model = "file"\nport = 1\nmax_n = 1\nmax_num_seqs = 1\n')
    found = settings("--config", path, "--port", "3", PORT="2", MAX_N="2")
    assert (found["model"], found["port"], found["max_n"], found["max_num_seqs"]) == ("file", 3, 2, 1)
    assert settings("flag", MODEL="environment", CONFIG=path)["model"] == "flag"
    assert settings(MODEL="environment", CONFIG=path)["model"] == "environment"
    assert settings() == {}


def test_either_form_of_speculation_replaces_the_other(tmp_path: Path) -> None:
    """`--speculation` in the environment hides `speculative_config` of the file, and the other way round."""
    path = written(tmp_path, 'speculative_config = \'{"method": "ngram"}\'\n')
    assert settings("--config", path, SPECULATION="none") == {"speculation": "none"}
    path = written(tmp_path, 'speculation = "ngram"\n')
    assert set(settings("--config", path, "--speculative-config", "{}")) == {"speculative_config"}
    with pytest.raises(ConfigError, match="speculation"):
        settings("--speculation", "none", "--speculative-config", "{}")


def test_lists_sizes_and_switches(tmp_path: Path) -> None:
    """Several keys and names, sizes with units, TOML's own types."""
    found = settings("--api-key", "a, b", SERVED_MODEL_NAME="x,y", MAX_BODY_BYTES="1MiB", TRUST_REMOTE_CODE="false")
    assert found["api_key"] == ("a", "b")
    assert found["served_model_name"] == ("x", "y")
    assert found["max_body_bytes"] == 1 << 20
    assert found["trust_remote_code"] is False
    path = written(tmp_path, 'api_key = ["a", "b"]\nkv_cache_memory = "2MB"\nread_timeout = 3\n')
    server, engine = split(settings("--config", path))
    assert server.api_key == ("a", "b")
    assert server.read_timeout == 3
    assert engine["kv_cache_memory"] == 2_000_000


def test_kubernetes_does_not_set_the_port() -> None:
    """A Kubernetes service called `paceline` sets PACELINE_PORT to an address; empty variables say nothing."""
    assert read_environment({"PACELINE_PORT": "tcp://10.0.0.1:8000", "PACELINE_HOST": "", "PATH": "x"}) == {}
    with pytest.raises(ConfigError, match="PACELINE_PORT"):
        read_environment({"PACELINE_PORT": "http://x"})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('nonesuch = 1\nmodel = "m"', "nonesuch"),
        ("port = ", "cannot read"),
        ('max_body_bytes = "1XB"', "max_body_bytes"),
        ("[server]\nport = 1", "server"),
        ("port = 70000", "port"),
        ('port = "eighty"', "port"),
        ("max_n = true", "max_n"),
        ("max_n = 1.5", "max_n"),
        ("read_timeout = 0", "read_timeout"),
        ("read_timeout = nan", "read_timeout"),
        ('api_key = ""', "api_key"),
        ("api_key = [1]", "api_key"),
        ('log_level = "loud"', "log_level"),
        ('tool_call_parser = "hermse"', "hermes"),
        ('reasoning_parser = "deepseek_r2"', "think"),
        ('tenant_header = "a: b"', "tenant_header"),
        ("model = 1", "model"),
        ('trust_remote_code = "yes"', "trust_remote_code"),
    ],
)
def test_mistakes_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, word: str
) -> None:
    """Exit code 2 and one line that names the key; no trace."""
    monkeypatch.setenv("PACELINE_MODEL", str(tmp_path / "absent"))
    monkeypatch.delenv("PACELINE_CONFIG", raising=False)
    monkeypatch.setattr("paceline.server.logs.setup_logging", lambda *_: None)
    assert main(["serve", "--config", written(tmp_path, text)]) == 2
    message = capsys.readouterr().err
    assert word in message
    assert "Traceback" not in message


@pytest.mark.parametrize("flag", ["--max-body-bytes=1XB", "--port=x", "--read-timeout=soon", "--max-body-bytes=-1"])
def test_mistakes_in_flags(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Named by argparse, exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(["serve", "m", flag])
    assert caught.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["MAX_N", "MAX_BODY_BYTES", "READ_TIMEOUT", "TRUST_REMOTE_CODE"])
def test_mistakes_in_the_environment(variable: str) -> None:
    """The variable is named."""
    with pytest.raises(ConfigError, match=f"PACELINE_{variable}"):
        settings("m", **{variable: "perhaps"})


def test_no_model_and_no_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once, before anything is loaded."""
    for name in ("MODEL", "CONFIG"):
        monkeypatch.delenv(f"PACELINE_{name}", raising=False)
    assert main(["serve"]) == 2
    assert "MODEL" in capsys.readouterr().err
    assert main(["serve", "m", "--config", "absent.toml"]) == 2
    assert "absent.toml" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["x\nevil: 1", "x:y", "", "é", "x y"])
def test_tenant_headers_are_header_names(value: str) -> None:
    """Nothing else can be one."""
    with pytest.raises(ConfigError, match="tenant_header"):
        ServerConfig(tenant_header=value)


def test_keys_may_come_from_the_environment() -> None:
    """Where they do not show in the process list. An empty flag or entry is a mistake: it would open the server."""
    server, _ = split(settings(API_KEY="secret"))
    assert server.api_key == ("secret",)
    for text in ("", " ", ","):
        with pytest.raises(SystemExit):
            settings("--api-key", text)
