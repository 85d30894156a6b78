"""A run's folder belongs to the options it was begun with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError, CorruptFileError


def check_run_folder(run: Path) -> None:
    """Refuse a run's folder that cannot be made.

    Raises:
        ConfigError: it is a file, or lies below one.
    """
    there = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{run} is, or lies below, a file.", field="--out", fix="Name a folder.")


def claim(run: Path, options: dict[str, Any]) -> None:
    """Write the options down in `run.json`, or compare them with those of the run that is being gone on with.

    Raises:
        ConfigError: the folder holds a run with other options; names the first that differs.
        CorruptFileError: `run.json` is damaged.
    """
    path = run / "run.json"
    wanted = json.loads(json.dumps(options))
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        os.replace(part, path)
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        fix = "Run the same command with --restart; the training text is kept."
        raise CorruptFileError("is damaged.", field=str(path), fix=fix) from error
    for key, now in wanted.items():
        if found.get(key) != now:
            difference = "another target" if key == "target" else f"{key} {found.get(key)}, now {now}"
            raise ConfigError(
                f"holds a run with other options ({difference}).",
                field=str(run),
                fix="Give the same options to go on, another --out, or --restart to begin anew on the same text.",
            )
