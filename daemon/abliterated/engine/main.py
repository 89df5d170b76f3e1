"""The engine as a process: `python -m abliterated.engine --listen HOST:PORT --models DIR [--parent-fd N]`.

Listens, says so on stderr, serves until SIGTERM or until the process that started it has ended. With `--parent-fd`
the parent holds the write end of that pipe: its end of file is the parent's end. On Linux PDEATHSIG does the same
without a pipe's help.
Does not know: routes, models.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from abliterate.contract.errors import AbliteratedError, AlreadyRunning, DiskError, RecipeError
from abliterated.engine.lifeline import die_with_parent, end_at_eof

_STOP_SECONDS = 0.5


def command(arguments: list[str]) -> int:
    """`python -m abliterated.engine`; returns the exit code. A failure is one line on stderr."""
    parser = argparse.ArgumentParser(prog="abliterated engine", description="Ollama's API over llama.cpp")
    parser.add_argument("--listen", default="127.0.0.1:11435", metavar="HOST:PORT")
    parser.add_argument(
        "--models", type=Path, required=True, metavar="DIR", help="the folder of models, in Ollama's layout"
    )
    parser.add_argument("--parent-fd", type=int, metavar="N", help="a pipe whose end of file ends the engine")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        return run(options.listen, options.models, options.parent_fd)
    except AbliteratedError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def run(listen: str, models: Path, parent_fd: int | None = None) -> int:
    """Serve until told to end; returns the exit code. Raises AbliteratedError."""
    if parent_fd is not None:
        # Started by a daemon: not to outlive it. Asked for before anything else, so that no moment is uncovered.
        die_with_parent(os.getppid())
        end_at_eof(parent_fd)
    try:
        asyncio.run(_serve(listen, models))
    except KeyboardInterrupt:
        return 130
    return 0


async def _serve(listen: str, models: Path) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    address = parse_address(listen)
    listener = bind(*address)
    # Heavier imports after the port is ours: a second engine fails at once.
    from aiohttp import web

    from abliterated.engine.server import allow_origin, build
    from abliterated.engine.service import Service

    try:
        service = Service(models)
        if not os.environ.get("OLLAMA_NOPRUNE"):
            service.store.tidy()
    except OSError as error:
        listener.close()
        raise DiskError(
            f"can't use {models} as the folder of models: {error.strerror}", remedy="Give a folder that can be written"
        ) from error
    app = build(service, loopback=ipaddress.ip_address(listener.getsockname()[0]).is_loopback)
    app.on_response_prepare.append(allow_origin)
    # Without handler_cancellation a client that leaves would go unnoticed until the next token is written.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_STOP_SECONDS)
    await runner.setup()
    try:
        site = web.SockSite(runner, listener, backlog=128)
        await site.start()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        sys.stderr.write(f"engine: listening on http://{shown}:{port}\n")
        sys.stderr.flush()
        await stop.wait()
        await site.stop()
    finally:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.pool.close(), 1.0)
        await runner.cleanup()


def parse_address(listen: str) -> tuple[str, int]:
    """`HOST:PORT`; raises RecipeError."""
    host, colon, port = listen.removeprefix("http://").rstrip("/").rpartition(":")
    host = host.strip("[]")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise RecipeError(f"{listen!r} is no HOST:PORT to listen on", remedy="Write for example 127.0.0.1:11435")
    return host or "127.0.0.1", int(port)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises AlreadyRunning where the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AlreadyRunning(
                f"{host}:{port} is taken by another process", remedy="Stop it, or listen on another port"
            ) from error
        raise RecipeError(
            f"can't listen on {host}:{port}: {error.strerror}", remedy="Give an address of this machine, as 127.0.0.1"
        ) from error
    listener.setblocking(False)
    return listener
