"""The configuration: the design's keys and defaults, where socket and spool lie, and how a wrong file is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from abliterate.contract.config import (
    Config,
    control_socket,
    default_config_file,
    home,
    load_config,
    parse_config,
)
from abliterate.contract.errors import RecipeError
from abliterate.contract.paths import directories
from contract_recipe.design_examples import CONFIG


def test_the_design_s_configuration_parses_and_is_the_default() -> None:
    assert parse_config(CONFIG.encode()) == Config()


def test_every_key_of_the_design_has_its_default() -> None:
    defaults: dict[str, Any] = msgspec.to_builtins(Config())
    for table, keys in tomllib.loads(CONFIG).items():
        for key, value in keys.items():
            assert defaults[table][key] == value, f"{table}.{key}"


def test_further_upstreams_are_a_list() -> None:
    text = b'[[upstream]]\npattern = "big-*"\nurl = "http://box:11434"\n[[upstream]]\npattern = "x"\nurl = "http://y"\n'
    assert [further.pattern for further in parse_config(text).upstream] == ["big-*", "x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[proxi]\n", ["c.toml, line 1: proxi: unknown key", "proxy"]),
        ("[proxy]\nlissen = 1\n", ["line 2: proxy.lissen", "did you mean `listen`?"]),
        ('[proxy]\nduring_jobs = "shared"\n', ["line 2: proxy.during_jobs", "did you mean 'share'?"]),
        ('[trust]\nremote_code = ["org/repo"]\n', ["line 2: trust.remote_code", "not pinned"]),
        ("[jobs]\nretries = -1\nkeep_days = 1e9\n", ["line 2: jobs.retries", "line 3: jobs.keep_days"]),
        ('[[upstream]]\npattern = "x"\n', ["upstream"]),
        ('[jobs]\non_finish = "rm -rf"\n', ["line 2: jobs.on_finish"]),
    ],
)
def test_what_is_wrong_is_said(text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_config(text.encode(), "c.toml")
    for word in words:
        assert word in caught.value.message


def test_the_default_file_may_be_missing_a_named_one_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATED_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(RecipeError, match="no such configuration file"):
        load_config(tmp_path / "none.toml")
    monkeypatch.delenv("ABLITERATED_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load_config() == Config()


def test_a_file_named_by_the_environment_may_not_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATED_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(RecipeError, match="no such configuration file"):
        load_config()


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="can't be read"):
        load_config(tmp_path)


def test_systemd_s_folders_come_first_then_xdg_then_the_platform_s(tmp_path: Path) -> None:
    both = {"STATE_DIRECTORY": "/var/lib/abliterated:/other", "XDG_STATE_HOME": "/x"}
    assert directories(both).state == Path("/var/lib/abliterated")
    assert directories({"XDG_STATE_HOME": "/x"}).state == Path("/x/abliterated")
    assert default_config_file({"XDG_CONFIG_HOME": "/x"}) == Path("/x/abliterated/config.toml")
    assert default_config_file({"ABLITERATED_CONFIG": "/y.toml"}) == Path("/y.toml")
    import platformdirs

    bare = directories({})
    assert bare.state == platformdirs.user_state_path("abliterated", appauthor=False)
    assert bare.cache == platformdirs.user_cache_path("abliterated", appauthor=False)
    assert bare.config == platformdirs.user_config_path("abliterated", appauthor=False)
    assert bare.runtime == bare.state / "run"


def test_a_home_of_its_own_brings_a_socket_and_a_spool_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    config = parse_config(b'[paths]\nstate = "/s"')
    assert control_socket(config) == Path("/s/control.sock")
    assert home(config).incoming == Path("/s/spool/incoming")
    named = parse_config(b'[paths]\nspool = "/in"\n[control]\nsocket = "/run/x.sock"')
    assert control_socket(named) == Path("/run/x.sock")
    assert home(named).rejected == Path("/in/rejected")
