"""The proxy as `abliterated serve` keeps it: its settings, its figures, what the control socket tells."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path

import pytest

from e2e.daemons import House
from proxy.script import DEADLINE
from proxy.test_succession import TOKENS, small_ollama, until


def control(house: House, path: str) -> str:
    connection = http.client.HTTPConnection("localhost", timeout=DEADLINE)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(house.state / "control.sock"))
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


@pytest.mark.parametrize("alias", [False, True])
def test_figures_by_route_and_model_are_on_the_control_socket_and_nowhere_else(tmp_path: Path, alias: bool) -> None:
    with small_ollama() as upstream:
        house = House(tmp_path, upstream=upstream)
        log = tmp_path / "access.log"
        house.configure("ollama", proxy={"aliases": {"a": "b:1"} if alias else {}, "access_log": str(log)})
        house.serve()
        try:
            for path in ("/api/chat", "/metrics"):
                connection = http.client.HTTPConnection("127.0.0.1", house.proxy, timeout=DEADLINE)
                connection.request("POST" if path == "/api/chat" else "GET", path, b'{"model":"a"}')
                said = connection.getresponse().read()
                connection.close()
                assert said == (b"".join(TOKENS) if path == "/api/chat" else b'{"version":"0.34.1"}')  # the upstream's
            model = "b:1" if alias else "a"
            wanted = f'abliterated_proxy_requests_total{{route="/api/chat",model="{model}",status="200"}} 1'
            until(lambda: wanted in control(house, "/metrics"))
            assert "abliterated_proxy_accepted_total 2" in control(house, "/metrics")
            assert "does not serve" not in (tmp_path / "daemon.log").read_text()
        finally:
            house.stop()
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["target"] for line in lines] == ["/api/chat", "/metrics"]
