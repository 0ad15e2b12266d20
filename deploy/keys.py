"""Key material of an installation: files below the data directory, readable by their owner only.

Promises that an existing key is never replaced. Holds the pepper of API keys; further keys join it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from deploy.settings import Settings, SettingsError


def pepper_file(data_dir: Path) -> Path:
    """Where the pepper of API keys lies."""
    return data_dir / "keys" / "pepper"


def init(data_dir: Path) -> list[Path]:
    """Make what is missing; returns the files that were made."""
    path = pepper_file(data_dir)
    if path.exists():
        return []
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return [path]


def pepper(settings: Settings) -> bytes:
    """The pepper of API keys. Raises SettingsError when there is none."""
    if settings.pepper is not None:
        return settings.pepper.get_secret_value().encode()
    path = pepper_file(settings.data_dir)
    if not path.exists():
        raise SettingsError("no pepper for API keys; run 'riskfleet keys init' or set RISKFLEET_PEPPER")
    return path.read_text().strip().encode()
