"""Settings of the commands from the environment (`REGROW_*`); flags win over them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from orchestrator.core.errors import InvalidInput

DEFAULT_PORT = 7470


class Settings(BaseSettings):
    """Where the controller is, and the token to talk to it."""

    model_config = SettingsConfigDict(env_prefix="REGROW_", extra="ignore")

    url: str = f"http://127.0.0.1:{DEFAULT_PORT}"
    """`REGROW_URL`: address of the controller."""
    token: SecretStr | None = None
    """`REGROW_TOKEN`: the token itself."""
    token_file: Path | None = None
    """`REGROW_TOKEN_FILE`: a file that holds the token."""


def load() -> Settings:
    """The settings; raises `InvalidInput` naming the variable that is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"REGROW_{str(first['loc'][0]).upper()}"
        raise InvalidInput(f"the environment variable {name} is wrong ({first['msg']}): correct it") from error


def token(settings: Settings, file: Path | None) -> str:
    """The token: from `file` (a flag), else the environment; raises `InvalidInput` when there is none."""
    path = file or (None if settings.token is not None else settings.token_file)
    if path is not None:
        try:
            text = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise InvalidInput(f"the token file {path} cannot be read ({reason}): check the path") from error
    else:
        text = settings.token.get_secret_value().strip() if settings.token is not None else ""
    if not text:
        where = f"the token file {path} is empty" if path is not None else "no token is given"
        raise InvalidInput(f"{where}: set REGROW_TOKEN, or give --token-file FILE")
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise InvalidInput("the token holds characters that no HTTP header can carry: use letters and digits")
    return text


def create_token(file: Path) -> None:
    """Write a fresh random token to `file`, readable by its owner only; an existing file stays as it is."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    except OSError as error:
        raise InvalidInput(f"the token file {file} cannot be created ({error.strerror}): check its folder") from error
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_urlsafe(32) + "\n")
