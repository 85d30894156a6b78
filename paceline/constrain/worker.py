"""The compiler's own process: `python -m paceline.constrain.worker FD SECONDS BYTES`.

Compiling what users send may take for ever, need any amount of memory or crash, so it happens here, one source at a
time, under a memory limit and an alarm that ends the process. Nothing else of the engine runs in it.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np
import xgrammar

from paceline.constrain.ebnf import Alternatives, endless_rules, read_rules, uses
from paceline.constrain.schema import Problem, check_schema, check_structural_tag

MOST_BYTES = 16 << 20
"""Of a compiled grammar; reading one in stops the engine for about 10 ms a megabyte."""
_PROBE_TOKENS = 512
_PROBE_SECONDS = 3.0
_PROBE_MASK_SECONDS = 0.5
_BROAD_CHARACTER = r"[^\"\\\r\n]"
_JSON_CHARACTER = r"[^\0-\x1f\"\\]"
_WARNING = re.compile(r"Warning: (.*(?:ignor|not supported|cannot be represented|unsupported).*)")


def main(fd: int, seconds: float, memory: int) -> None:
    """Serve one source after another until the other end closes."""
    link = Connection(fd)
    info = xgrammar.TokenizerInfo.deserialize_json(link.recv_bytes().decode())
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    log = _log_to_file()
    limit = _data_bytes() + memory
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    link.send_bytes(b"ready")
    while True:
        try:
            kind, text = json.loads(link.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its default action ends the process
        link.send_bytes(_answer(compiler, info, kind, text, log))
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _answer(compiler: Any, info: Any, kind: str, text: str, log: IO[bytes]) -> bytes:
    """`+` and the compiled grammar, or `-` and why there is none."""
    try:
        return b"+" + _compile(compiler, info, kind, text, log)
    except Problem as problem:
        return b"-" + json.dumps([problem.message, problem.fix]).encode()
    except MemoryError:
        return b"-" + json.dumps(["needs too much memory to compile.", "Shorten it."]).encode()
    except RecursionError:
        return b"-" + json.dumps(["is nested too deeply.", "Use fewer levels."]).encode()
    except Exception as error:
        message = _readable(str(error))
        if "bad_alloc" in message:
            message = "needs too much memory to compile."
        if message.startswith("Circular $ref"):
            message = f"allows text that can never end ({message}). Give every recursion a way out."
        return b"-" + json.dumps([message, None]).encode()


def _compile(compiler: Any, info: Any, kind: str, text: str, log: IO[bytes]) -> bytes:
    log.truncate(0)
    grammar = _PARSE[kind](text)
    printed = str(grammar)
    rules = read_rules(printed)
    endless = endless_rules(rules)
    if endless:
        raise Problem(
            f"allows text that can never end (rule {min(endless)!r} always needs more).",
            "Give every recursion a way out.",
        )
    compiled = _compile_soundly(compiler, grammar, printed, rules, json_text=kind in ("json_schema", "structural_tag"))
    log.seek(0)
    for warning in _WARNING.findall(log.read().decode(errors="replace")):
        raise Problem(f"cannot be enforced: {_readable(warning)}", "Leave that part out.")
    _probe(compiled, info)
    serialised: bytes = compiled.serialize_json().encode()
    if len(serialised) > MOST_BYTES:
        raise Problem(
            f"compiles to {len(serialised) >> 20} MiB, and may take {MOST_BYTES >> 20} MiB.",
            "Shorten it, or lower its repetitions and length limits.",
        )
    return serialised


def _compile_soundly(
    compiler: Any, grammar: Any, printed: str, rules: Mapping[str, Alternatives], *, json_text: bool
) -> Any:
    """Compile around two flaws of xgrammar (0.2.8).

    Strings with a length limit may hold control characters, which JSON forbids. And where the first rule refers to
    itself, masks lack tokens that close two levels at once, since a text is taken to end with that rule.
    """
    sound = printed.replace(_BROAD_CHARACTER, _JSON_CHARACTER) if json_text else printed
    first = "root"
    if uses(rules, first):
        first = next(name for name in map("start_{}".format, range(len(rules) + 1)) if name not in rules)
        sound += f"\n{first} ::= ((root))\n"
    return (
        compiler.compile_grammar(grammar) if sound == printed else compiler.compile_grammar(sound, root_rule_name=first)
    )


def _schema(text: str) -> Any:
    check_schema(text)
    return xgrammar.Grammar.from_json_schema(text, any_whitespace=False)


def _structural_tag(text: str) -> Any:
    check_structural_tag(text)
    return xgrammar.Grammar.from_structural_tag(text)


def _choice(text: str) -> Any:
    return xgrammar.Grammar.from_ebnf("root ::= " + " | ".join(_literal(choice) for choice in json.loads(text)))


def _literal(text: str) -> str:
    """A text in EBNF."""
    plain = set(map(chr, range(32, 127))) - {'"', "\\"}
    return '"' + "".join(c if c in plain else f"\\U{ord(c):08X}" for c in text) + '"'


_PARSE: dict[str, Callable[[str], Any]] = {
    "json_object": lambda _: xgrammar.Grammar.from_json_schema('{"type": "object"}', any_whitespace=False),
    "json_schema": _schema,
    "regex": lambda text: xgrammar.Grammar.from_regex(text),
    "choice": _choice,
    "grammar": lambda text: xgrammar.Grammar.from_ebnf(text),
    "structural_tag": _structural_tag,
}


def _probe(compiled: Any, info: Any) -> None:
    """Walk along random allowed tokens; refuse a grammar without a beginning, or one whose masks are slow.

    An ambiguous grammar can take seconds a token, and the engine cannot interrupt a mask once it has begun.
    """
    vocab, ends = info.vocab_size, info.stop_token_ids
    matcher = xgrammar.GrammarMatcher(compiled)
    mask = np.zeros((1, -(-vocab // 32)), dtype=np.int32)
    chance = random.Random(0)
    started = time.thread_time()
    for step in range(_PROBE_TOKENS):
        before = time.thread_time()
        matcher.fill_next_token_bitmask(mask)
        with suppress(UnicodeDecodeError):  # it may end inside a character
            matcher.find_jump_forward_string()
        bits = np.unpackbits(mask[0].view(np.uint8), count=vocab, bitorder="little")
        bits[ends] = 0
        tokens = np.flatnonzero(bits)
        if step == 0 and not len(tokens):
            raise Problem("allows no text, or only the empty one.", "Check its parts against one another.")
        if len(tokens):
            matcher.accept_token(int(chance.choice(tokens)))
        else:
            matcher.reset()
        now = time.thread_time()
        if now - before > _PROBE_MASK_SECONDS or now - started > _PROBE_SECONDS:
            raise Problem(
                f"is too slow to follow: {now - started:.1f} s for {step + 1} token(s).",
                "Make it less ambiguous, or shorten its repetitions.",
            )


def _readable(message: str) -> str:
    """An error of xgrammar without its source line."""
    message = re.sub(r"^.*?\.cc:\d+: ", "", message.strip(), flags=re.DOTALL)
    message = re.sub(r"^Check failed: .*? is (?:false|true): ", "", message)
    return " ".join(message.split())[:300]


def _log_to_file() -> IO[bytes]:
    """Send standard error to a file: xgrammar says there what it ignores."""
    log = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115  open as long as the process
    os.dup2(log.fileno(), sys.stderr.fileno())
    return log


def _data_bytes() -> int:
    """What RLIMIT_DATA counts already."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
