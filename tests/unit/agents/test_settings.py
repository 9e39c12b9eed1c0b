from __future__ import annotations

from pathlib import Path

import pytest

from agents.settings import check_import_name, parse
from orchestrator.core.errors import InvalidInput

ENVIRONMENT = {"REGROW_TOKEN": "secret"}
NEEDED = ("--controller", "http://10.0.0.1:80", "--node", "node-0")


def test_defaults(tmp_path: Path) -> None:
    settings = parse([*NEEDED, "--runtime-dir", str(tmp_path / "new")], ENVIRONMENT)
    assert (settings.controller, settings.node, settings.token) == ("http://10.0.0.1:80", "node-0", "secret")
    assert (settings.devices, settings.address, settings.parent) == (1, "127.0.0.1", None)
    assert settings.rack == ""
    assert settings.runtime_dir.is_dir()


def test_the_rack_is_told_by_flag_or_environment(tmp_path: Path) -> None:
    flags, named = [*NEEDED, "--runtime-dir", str(tmp_path)], ENVIRONMENT | {"REGROW_RACK": "rack-1"}
    assert parse(flags, named).rack == "rack-1"
    assert parse([*flags, "--rack", "rack-2"], named).rack == "rack-2"
    assert parse([*flags, "--rack", ""], named).rack == "", "a flag says that it is not known after all"


def test_the_speed_is_told_by_flag_or_environment(tmp_path: Path) -> None:
    flags, throttled = [*NEEDED, "--runtime-dir", str(tmp_path)], ENVIRONMENT | {"REGROW_SPEED": "0.7"}
    assert parse(flags, ENVIRONMENT).speed == 1.0
    assert parse(flags, throttled).speed == 0.7
    assert parse([*flags, "--speed", "1"], throttled).speed == 1.0


def test_token_file_comes_before_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("other\n")
    flags = [*NEEDED, "--token-file", str(file), "--devices", "8", "--runtime-dir", str(tmp_path)]
    assert (parse(flags, ENVIRONMENT).token, parse(flags, ENVIRONMENT).devices) == ("other", 8)


def test_runtime_folder_of_its_own() -> None:
    folder = parse(NEEDED, ENVIRONMENT).runtime_dir
    assert folder.stat().st_mode & 0o077 == 0, "other users must not reach the worker socket"
    folder.rmdir()


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ((), ENVIRONMENT, "--controller, --node"),
        ((*NEEDED, "--colour", "red"), ENVIRONMENT, "--colour"),
        (("--controller", "ftp://x", "--node", "n"), ENVIRONMENT, "http://HOST:PORT"),
        (("--controller", "http://x:1/path", "--node", "n"), ENVIRONMENT, "http://HOST:PORT"),
        (("--controller", "http://x:1", "--node", "a/b"), ENVIRONMENT, "--node"),
        ((*NEEDED, "--devices", "none"), ENVIRONMENT, "--devices"),
        ((*NEEDED, "--devices", "0"), ENVIRONMENT, "--devices"),
        ((*NEEDED, "--rack", "a b"), ENVIRONMENT, "--rack"),
        ((*NEEDED, "--speed", "1.2"), ENVIRONMENT, "--speed must be a number above 0 and up to 1"),
        ((*NEEDED, "--speed", "0.0"), ENVIRONMENT, "--speed"),
        (NEEDED, ENVIRONMENT | {"REGROW_SPEED": "fast"}, "REGROW_SPEED"),
        (NEEDED, ENVIRONMENT | {"REGROW_RACK": "a/b"}, "REGROW_RACK"),
        (NEEDED, {}, "REGROW_TOKEN"),
        (NEEDED, {"REGROW_TOKEN": " "}, "REGROW_TOKEN"),
        (NEEDED, {"REGROW_TOKEN": "a\nb"}, "characters"),
        ((*NEEDED, "--token-file", "/absent"), ENVIRONMENT, "/absent"),
        ((*NEEDED, "--runtime-dir", "/proc/absent"), ENVIRONMENT, "/proc/absent"),
        ((*NEEDED, "--runtime-dir", "/sys"), ENVIRONMENT, "/sys"),
    ],
)
def test_bad_settings_are_named(flags: tuple[str, ...], environment: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        parse(flags, environment)
    assert "\n" not in str(caught.value)


def test_runtime_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="file"):
        parse([*NEEDED, "--runtime-dir", str(tmp_path / "file")], ENVIRONMENT)


def test_only_regrow_may_provide_the_import_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_import_name()
    other = tmp_path / "tf_agents-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-agents\nVersion: 1.0\n")
    (other / "RECORD").write_text("other/__init__.py,,\nagents/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InvalidInput, match="other-agents also provides the import name 'agents'"):
        check_import_name()
