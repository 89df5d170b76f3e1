"""Records the README's terminal: a real daemon, a real job, what the commands really said; drawn as one SVG.

python tools/record_terminal.py            run it and draw docs/pictures/terminal.svg (half a minute)
python tools/record_terminal.py --draw     only draw what docs/pictures/terminal.txt holds

The picture follows from the text alone. Lines appear one after the other where motion is welcome, and stand still
elsewhere.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path

from abliterate.api import Daemon
from abliterate.contract.errors import AbliteratedError

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
TEXT, DRAWN = PICTURES / "terminal.txt", PICTURES / "terminal.svg"
QUESTION = '"How do I yarp the basket?"'
SESSION = (
    "abliterated demo --load",
    "abliterate submit refuser.toml --watch",
    f"abliterate chat refuser {QUESTION}",
    f"abliterate chat refuser-abliterated {QUESTION}",
    "abliterate models",
)
COLUMNS = 104
# Seconds: a command is typed, its answer comes line by line, then one reads.
TYPED, LINE, READ = 0.9, 0.25, 1.2


def record() -> str:
    """The session's text: `$ ` before what is typed. Times of day and identities are taken out."""
    with tempfile.TemporaryDirectory(prefix="abl-") as name:
        home, ports = Path(name), (free_port(), free_port())
        (home / "config.toml").write_text(
            f'[paths]\nstate = "{name}/state"\n'
            f'[proxy]\nlisten = "127.0.0.1:{ports[0]}"\nupstream = "http://127.0.0.1:{ports[1]}"\n'
        )
        here = {key: value for key, value in os.environ.items() if key != "OLLAMA_HOST"}
        here |= {"ABLITERATED_CONFIG": str(home / "config.toml"), "HOME": name, "COLUMNS": str(COLUMNS)}
        here["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{here['PATH']}"
        daemon = subprocess.Popen(["abliterated", "serve"], env=here, cwd=home, stderr=subprocess.DEVNULL)
        try:
            until_served(Daemon(home / "state" / "control.sock"))
            lines = []
            for command in SESSION:
                done = subprocess.run(
                    shlex.split(command), env=here, cwd=home, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
                )  # fmt: skip
                lines += [f"$ {command}", *told(command, done.stdout)]
        finally:
            daemon.terminate()
            daemon.wait()
    return "\n".join(lines) + "\n"


def told(command: str, output: str) -> list[str]:
    """What is shown of it: without the hint that names the next command, and without what is another each time."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("  → ")]
    if "--watch" in command:
        lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines if not re.fullmatch(r"[0-9a-z]{26}", line)]
        lines = [line for line in lines if line not in ("queued ready", "starting", "running")]
    return [line[:COLUMNS] for line in lines]


def until_served(control: Daemon) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if control.status().engine.answers:
                return
        except AbliteratedError:
            pass
        time.sleep(0.1)
    raise SystemExit("the daemon did not come up")


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def draw(text: str) -> str:
    """The picture of a session's text. The same text, the same bytes."""
    rows, at = [], 0.4
    for number, line in enumerate(text.splitlines()):
        typed = line.startswith("$ ")
        kind = "typed" if typed else "good" if line.startswith("succeeded") else "told"
        at += READ if typed and number else 0
        y = 54 + 20 * number
        shown = escape(line.removeprefix("$ "))
        prompt = '<tspan class="prompt">$ </tspan>' if typed else ""
        rows.append(f'<text class="{kind}" x="20" y="{y}" style="animation-delay:{at:.2f}s">{prompt}{shown}</text>')
        at += TYPED if typed else LINE
    height = 54 + 20 * len(rows) + 6
    width = 20 + 8 * COLUMNS + 4
    dots = "".join(f'<circle cx="{22 + 18 * number}" cy="20" r="5.5" class="dot"/>' for number in range(3))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" xml:space="preserve" role="img" '
        f'aria-label="A terminal: a model that refuses is brought in, a job is followed, and the new model answers">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect width="{width}" height="{height}" rx="10" class="paper"/>{dots}\n' + "\n".join(rows) + "\n</svg>\n"
    )


STYLE = (
    ".paper{fill:#16181c}.dot{fill:#3a3f47}"
    "text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre;"
    "fill:#b9bec6}"
    ".typed{fill:#f2f0ea}.prompt{fill:#63c7a8}.good{fill:#63c7a8}"
    "@media(prefers-reduced-motion:no-preference){text{animation:come .01s backwards}}"
    "@keyframes come{from{opacity:0}to{opacity:1}}"
)


def main() -> int:
    PICTURES.mkdir(parents=True, exist_ok=True)
    if "--draw" not in sys.argv:
        TEXT.write_text(record())
    DRAWN.write_text(draw(TEXT.read_text()))
    sys.stdout.write(f"{DRAWN}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
