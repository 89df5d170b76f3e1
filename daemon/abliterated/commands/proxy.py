"""`abliterated proxy`: the proxy alone."""

from __future__ import annotations

import argparse

HELP = "run the transparent proxy alone"
EXAMPLES = """\
examples:
  abliterated proxy --listen 127.0.0.1:11434 --upstream http://127.0.0.1:11435

SIGTERM lets what is under way end, and leaves. SIGHUP, where no terminal is closed with it, starts the program anew on
the same sockets first: no request is lost. Listening sockets may come from a service manager (LISTEN_FDS).

exit codes: 0 stopped; 2 a wrong address; 75 the port is taken."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", default="127.0.0.1:11434", metavar="HOST:PORT", help="default 127.0.0.1:11434")
    parser.add_argument(
        "--upstream", default="http://127.0.0.1:11435", metavar="URL", help="default http://127.0.0.1:11435"
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="listen beyond loopback: everybody who reaches the port reaches Ollama",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="beyond loopback: a name clients may call this machine by; * for any; may be repeated",
    )
    parser.add_argument(
        "--assist",
        choices=["off", "needed", "any"],
        default="needed",
        help="tools and thinking for abliterated models where the engine lacks them; any: for those never taught, too",
    )
    parser.add_argument(
        "--assist-more",
        action="append",
        choices=["tool_choice", "parallel_tool_calls", "thinking_history"],
        default=[],
        help="more that engines drop, and the proxy then does; may be repeated",
    )
    parser.add_argument("--access-log", default="", metavar="FILE", help="a JSON line for each exchange")


def run(options: argparse.Namespace) -> int:
    from abliterated import logs, service, succession
    from abliterated.assisting import Assisting
    from abliterated.proxy import alone, server

    logs.set_up()
    left = succession.Inheritance()
    activated = [listener for listeners in service.inherited_sockets().values() for listener in listeners]
    sockets = [*left.sockets, *activated]
    proxy = server.Proxy(
        "" if sockets else options.listen,
        options.upstream,
        allow_remote=options.allow_remote,
        allowed_hosts=options.allow_host,
        sockets=sockets,
        steering=server.Steering(access_log=options.access_log),
    )
    beside = Assisting(proxy, options.upstream, options.assist, options.assist_more)
    hand_over = None if succession.in_a_terminal() else succession.hand_over
    return alone.run(proxy, serving=left.serving, hand_over=hand_over, beside=beside)
