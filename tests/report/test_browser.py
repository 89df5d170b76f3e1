"""The page in a real browser: it asks for nothing, complains of nothing, and is as wide as the window."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from abliterated.report import page
from report.samples import least, rich

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM_BIN") or next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install it, or set CHROMIUM_BIN")


def browse(tmp_path: Path, html: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open it in a browser that may reach nothing."""
    (tmp_path / "report.html").write_text(html)
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--log-net-log={tmp_path / 'net.json'}",
            *flags,
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_asks_for_nothing_and_complains_of_nothing(tmp_path: Path, dark: bool) -> None:
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    for html in (page(rich()), page(least())):
        done = browse(tmp_path, html, *theme, "--dump-dom")
        assert "<h1>" in done.stdout
        # The browser has pages of its own, which complain of a slow network.
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        complaints = [line for line in said if not re.search(r"source: chrome://\S+ \(\d+\)$", line)]
        assert complaints == []
        asked = set(re.findall(r'"url":"(https?://[^"]+)"', (tmp_path / "net.json").read_text()))
        # The browser's own errands; the page has none.
        assert not [url for url in asked if not re.search(r"//[\w.-]*(google|gstatic|gvt1)[\w.-]*\.com/", url)]


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_window_is_too_narrow_and_the_styles_are_taken(tmp_path: Path, width: int) -> None:
    # A page of our own around it measures: the report itself may run no script.
    probe = (
        "<!doctype html><iframe id=f style='border:0;width:WIDTHpx;height:800px'></iframe><script>"
        "const f = document.getElementById('f'); f.srcdoc = HTML; f.onload = () => {"
        "const d = f.contentDocument; const e = d.documentElement;"
        "const cut = [...d.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth);"
        "document.title = JSON.stringify({wide: e.scrollWidth, view: e.clientWidth,"
        "cut: cut.map(one => one.ariaLabel),"
        "font: getComputedStyle(d.querySelector('main')).maxWidth}); document.body.append(document.title) }</script>"
    )
    import json

    html = json.dumps(page(rich("a-very-long-name-" * 8))).replace("</", "<\\/")
    done = browse(tmp_path, probe.replace("WIDTH", str(width)).replace("HTML", html), "--dump-dom")
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found, done.stdout[-500:]
    told = json.loads(found[1])
    assert told["wide"] <= told["view"] == width
    assert told["cut"] == []  # on a phone, too, nothing need be pushed sideways to be read
    assert told["font"] == "1080px"  # the policy's digest is that of the style sheet
