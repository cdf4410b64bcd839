"""Weights & Biases, which verl starts: its login is checked before the run, and a resumed run continues its W&B run."""

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from sft_recipe.errors import PreflightError
from sft_recipe.files import user_path, write_text

ID_FILE = "wandb_run_id"  # in the run folder
KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def check_login() -> None:
    """Raise PreflightError where wandb would be online and finds no API key."""
    settings = _settings()
    mode = os.environ.get("WANDB_MODE") or settings.get("mode") or "online"
    is_disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    if mode in ("offline", "disabled", "dryrun") or is_disabled:
        return
    if any(os.environ.get(name) for name in KEYS) or "api_key" in settings or _has_netrc_entry(settings):
        return
    raise PreflightError(
        "trainer.logger names wandb, and there is no API key for it: run `wandb login`, or set WANDB_API_KEY, or "
        "WANDB_MODE=offline to log into the run folder"
    )


def prepare_environment(folder: Path, is_continued: bool) -> None:
    """Let wandb write into the run folder, and continue the run whose id is there if `is_continued`.

    What the user has set stays. Raises OSError.
    """
    for name, value in _read(_local_settings()).items():  # wandb does not find it from the run folder
        os.environ.setdefault(f"WANDB_{name.upper()}", value)
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("WANDB_RESUME", "allow")
    if "WANDB_RUN_ID" not in os.environ:
        id_file = folder / ID_FILE
        if not (is_continued and id_file.is_file()):
            write_text(id_file, uuid4().hex[:12])
        os.environ["WANDB_RUN_ID"] = id_file.read_text().strip()


def _has_netrc_entry(settings: dict[str, str]) -> bool:
    """Any W&B server counts that is the chosen one, or has wandb in its name."""
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "").netloc
    path = user_path(os.environ.get("NETRC") or "~/.netrc")
    try:
        hosts = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host == server or "wandb" in host for host in hosts)


def _settings() -> dict[str, str]:
    """The files of `wandb login` and `wandb offline`: the user's, and the one of this folder, which wins."""
    users = user_path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb") / "settings"
    return _read(users) | _read(_local_settings())


def _local_settings() -> Path:
    return user_path(os.environ.get("WANDB_DIR") or ".") / "wandb/settings"


def _read(path: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["default"]) if "default" in parser else {}
