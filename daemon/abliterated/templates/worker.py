"""`go_template_for` in its own process, with a deadline: a chat template is a stranger's program and may never end.

`python -m abliterated.templates.worker` reads a Jinja template from stdin and writes JSON to stdout.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys

DEADLINE = 30.0  # seconds; a common template takes a tenth of one

logger = logging.getLogger(__name__)


def go_template_for(jinja: str, *, deadline: float = DEADLINE) -> str | None:
    """As `go.go_template_for`; None too where the template takes too long or brings its process down. Blocking."""
    command = [sys.executable, "-m", "abliterated.templates.worker"]
    try:
        done = subprocess.run(command, input=jinja.encode(), capture_output=True, timeout=deadline, check=True)
        answer = json.loads(done.stdout)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        logger.warning("no Go template: %s", type(error).__name__, extra={"action": "templates.go"})
        return None
    return answer if isinstance(answer, str) else None


def main() -> None:
    from abliterated.templates.go import go_template_for as learn

    sys.stdout.write(json.dumps(learn(sys.stdin.buffer.read().decode("utf-8", "replace"))))


if __name__ == "__main__":
    main()
