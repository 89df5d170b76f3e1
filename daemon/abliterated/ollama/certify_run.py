"""`python -m abliterated.ollama.certify_run`: one certification in a process of its own; its outcome as JSON on stdout.

Ends with 0 and a certificate, or with our error's exit code and an error body. Does not know jobs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from abliterate.contract.errors import AbliteratedError
from abliterate.contract.messages import ErrorBody
from abliterated.ollama.certify import Certificate, certify
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.header import TEMPLATE, known_keys


def main(arguments: Sequence[str] | None = None) -> int:
    """Certify; returns the exit code."""
    parser = argparse.ArgumentParser(prog="certify_run", description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--reference", default="")
    parser.add_argument("--product", type=Path, help="the GGUF, for the template inside it")
    parser.add_argument("--baked", action="store_true")
    options = parser.parse_args(arguments)

    jinja = str(known_keys(options.product, (TEMPLATE,)).get(TEMPLATE, "")) if options.product else ""

    async def work() -> Certificate:
        async with OllamaClient(options.url) as client:
            return await certify(client, options.model, options.reference, baked=options.baked, jinja=jinja)

    try:
        found: Certificate | ErrorBody = asyncio.run(work())
        code = 0
    except AbliteratedError as error:
        found, code = ErrorBody(error=error.message, remedy=error.remedy, exit_code=error.exit_code), error.exit_code
    sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    sys.stdout.buffer.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
