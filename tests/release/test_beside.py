"""What lies beside the program: the dashboard, the composition, the lock's readers. Checked for form and for names."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from abliterate.contract.config import parse_config
from engines import free_port

ROOT = Path(__file__).resolve().parents[2]


def test_the_dashboard_names_only_metrics_there_are_and_each_of_them() -> None:
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "tools" / "reference.py")
    assert spec and spec.loader
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    kinds = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", reference.metrics(), re.M))
    board = json.loads((ROOT / "docs" / "how-to" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in board["templating"]["list"]]
    named = {name for text in asked for name in re.findall(r"\babliterated_\w+", text)}
    for name in named:
        family = name.removesuffix("_bucket")
        assert family in kinds, name
        assert (family != name) == (kinds[family] == "histogram"), f"{name} is a {kinds[family]}"
    shown = {name.removesuffix("_bucket") for name in named}
    assert set(kinds) - shown <= {"abliterated_proxy_accepted_total", "abliterated_proxy_all_requests_total"}
    assert {status for text in asked for status in re.findall(r'state=~?"([^"]+)"', text)}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert {panel["id"] for panel in board["panels"]} == set(range(1, len(places) + 1))


def test_the_composition_is_sound_and_its_configuration_can_be_read() -> None:
    told: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    ours, ollama = told["services"]["abliterated"], told["services"]["ollama"]
    config = parse_config(told["configs"]["abliterated"]["content"].encode())
    assert config.proxy.upstream == f"http://{ollama['environment']['OLLAMA_HOST']}"
    assert ours["network_mode"] == "service:ollama"
    assert ollama["ports"] == ["127.0.0.1:11434:11434"], "beyond the host's loopback nobody asks who comes"
    assert config.proxy.allow_remote
    for service in (ours, ollama):
        for volume in service["volumes"]:
            assert volume.partition(":")[0] in told["volumes"]
    assert ours["configs"][0]["source"] in told["configs"]


def test_what_the_container_starts_serves_and_its_health_check_tells(tmp_path: Path) -> None:
    """The image's own command, environment and check; only its folders, its ports and its engine are none here."""
    text = (ROOT / "Containerfile").read_text()
    told: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    words = {name: json.loads(re.findall(rf"^{name} (.+)$", text, re.M)[0]) for name in ("ENTRYPOINT", "CMD")}
    check = json.loads(re.findall(r"^HEALTHCHECK .* CMD (.+)$", text, re.M)[0])
    (last,) = [block for block in re.findall(r"^ENV ((?:.*\\\n)*.*)$", text, re.M) if "ABLITERATED_CONFIG" in block]
    environment = dict(pair.split("=", 1) for pair in last.replace("\\\n", " ").split())
    port = free_port()
    config = told["configs"]["abliterated"]["content"]
    for given, here in (("0.0.0.0:11434", f"127.0.0.1:{port}"), ("127.0.0.1:11435", f"127.0.0.1:{free_port()}")):
        assert given in config
        config = config.replace(given, here)
    with tempfile.TemporaryDirectory(prefix="abl-") as root:  # a socket's path must be short
        place = Path(root) / told["services"]["abliterated"]["configs"][0]["target"].lstrip("/")
        environment = {key: value if value[0] != "/" else root + value for key, value in environment.items()}
        assert environment["ABLITERATED_CONFIG"] == str(place)
        place.parent.mkdir(parents=True)
        place.write_text(config)
        environment |= {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": root}
        assert subprocess.run(check, env=environment, capture_output=True, timeout=150).returncode == 69
        with (tmp_path / "log").open("wb") as log:
            daemon = subprocess.Popen([*words["ENTRYPOINT"], *words["CMD"]], env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while (done := subprocess.run(check, env=environment, capture_output=True, timeout=150)).returncode:
                assert daemon.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            assert json.loads(done.stdout)["proxy"] == f"127.0.0.1:{port}"
        finally:
            daemon.send_signal(getattr(signal, re.findall(r"^STOPSIGNAL (\w+)$", text, re.M)[0]))
            assert daemon.wait(timeout=150) == 0


def test_the_container_file_copies_what_the_build_needs_and_starts_what_there_is() -> None:
    text = (ROOT / "Containerfile").read_text()
    steps = re.findall(r"^([A-Z]+) ", re.sub(r"\\\n", "", text), re.M)
    assert set(steps) <= {
        "FROM",
        "ARG",
        "ENV",
        "COPY",
        "RUN",
        "VOLUME",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert json.loads(re.findall(r"^ENTRYPOINT (.+)$", text, re.M)[0]) == ["abliterated"]
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {Path(package).parts[0] for package in wheel["packages"]} | {"README.md", "LICENSE", "pyproject.toml"}
    needed |= {source if source.startswith("docs/") else Path(source).parts[0] for source in wheel["shared-data"]}
    assert needed <= kept
    assert all((ROOT / name).exists() for name in kept)
