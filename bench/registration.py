"""Registration: a 2 GB GGUF into a local store against `cp` and sha256 of the same file; repair; certification.

The file is the demo's model with a long tail no engine reads: valid, and as slow to copy and hash as any of its size.
Every engine found here is measured: the embedded one and each real Ollama. The registering side runs in a process of
its own, whose memory is read before and at its peak. As a script it prints the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abliterated import refuser
from abliterated.ollama.admission import admit
from abliterated.ollama.certification import certify_apart
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.locate import Base, describe_base, resolve_base
from abliterated.ollama.register import register
from abliterated.ollama.repair import repair

SLOWER, GROWTH_MB, REPAIR_SECONDS, CERTIFY_SECONDS = 1.2, 10.0, 1.0, 5.0
BYTES = {False: 2_000_000_000, True: 250_000_000}
ROUNDS = {False: 3, True: 2}
FOLDER = Path(__file__).parents[1]
KEY = b"abliterated.content"


def measure(quick: bool) -> dict[str, float]:
    """Seconds, megabytes and ratios, each with its engine's name before it."""
    found: dict[str, float] = {"bytes": float(BYTES[quick])}
    for engine in _engines():
        if engine.missing:
            continue
        place = Path(tempfile.mkdtemp(prefix="bench-registration-"))
        try:
            with engine.start(place / "models") as running:
                figures = asyncio.run(_measure(running.base_url, place, quick))
        finally:
            shutil.rmtree(place, ignore_errors=True)
        found |= {f"{engine.id}.{name}": value for name, value in figures.items()}
    return found


def table(figures: dict[str, float]) -> str:
    """The figures against their bars."""
    engines = sorted({name.rpartition(".")[0] for name in figures if "." in name})
    lines = [
        f"registering {figures['bytes'] / 1e9:.2f} GB",
        f"  {'':<16}{'cp+sha256':>10}{'linked':>9}{'ratio':>7}{'uploaded':>10}{'disk MB':>9}{'RSS MB':>8}"
        f"{'repair':>8}{'certify':>9}",
    ]
    for engine in engines:
        mine = {
            name.removeprefix(engine + "."): value for name, value in figures.items() if name.startswith(engine + ".")
        }
        kept = (
            mine["ratio"] <= SLOWER
            and mine["extra_mb"] < 1
            and mine["growth_mb"] < GROWTH_MB
            and mine["repair_s"] <= REPAIR_SECONDS
            and mine["certify_s"] <= CERTIFY_SECONDS
        )
        lines.append(
            f"  {engine:<16}{mine['plain_s']:>10.2f}{mine['linked_s']:>9.2f}{mine['ratio']:>7.2f}"
            f"{mine['uploaded_s']:>10.2f}{mine['extra_mb']:>9.1f}{mine['growth_mb']:>8.1f}{mine['repair_s']:>8.3f}{mine['certify_s']:>9.2f}"
            f"  {'ok' if kept else 'over'}"
        )
    lines.append(
        f"  bars: ratio ≤ {SLOWER}, no extra disk, RSS < {GROWTH_MB:.0f} MB, repair ≤ {REPAIR_SECONDS:.0f} s, "
        f"certification of the demo's model ≤ {CERTIFY_SECONDS:.0f} s"
    )
    return "\n".join(lines)


async def _measure(url: str, place: Path, quick: bool) -> dict[str, float]:
    small = refuser.files()
    parameters = json.loads(small.parameters.read_text())
    async with OllamaClient(url) as client:
        base = await client.push_blob(small.model)
        template = small.template_go.read_text()
        body = {"files": {"model.gguf": base}, "template": template, "parameters": parameters}
        await client.create({"model": "base:1", **body})
    plain, linked, uploaded, growth, extra = [], [], [], [], []
    for number in range(ROUNDS[quick]):
        with make_product(place, number, BYTES[quick]) as product:
            plain.append(_copy_and_hash(product, place / "copy"))
            there = set((place / "models" / "blobs").iterdir())
            told = _side(url, product, "linked")
            linked.append(told["seconds"])
            growth.append(told["growth"] / 1e6)
            extra.append(_extra(set((place / "models" / "blobs").iterdir()) - there, product) / 1e6)
            _forget(place / "models" / "blobs", product)
            uploaded.append(_side(url, product, "uploaded")["seconds"])
    async with OllamaClient(url) as client:
        repaired, certified = await _repair(client, place), await _certify(client, place)
    return {
        "plain_s": min(plain),
        "linked_s": min(linked),
        "uploaded_s": min(uploaded),
        "ratio": min(linked) / min(plain),
        "uploaded_ratio": min(uploaded) / min(plain),
        "growth_mb": max(growth),
        "extra_mb": max(extra),
        "repair_s": repaired,
        "certify_s": certified,
    }


async def _repair(client: OllamaClient, place: Path) -> float:
    """A model by others of 2 GB is left from the last round; it lost its template."""
    name = [str(row["name"]) for row in await client.tags() if str(row["name"]).startswith("made:")][-1]
    await client.create({"model": name, "from": name, "parameters": {"stop": ["<tool_call>"]}})
    start = time.perf_counter()
    done = await repair(client, name, "base:1")
    taken = time.perf_counter() - start
    assert done.changed, "nothing was repaired"
    return taken


async def _certify(client: OllamaClient, place: Path) -> float:
    with make_product(place, 99, 0) as product:
        await admit(client, product, "demo:1", await resolve_base(client, "base:1"), reference="base:1")
        start = time.perf_counter()
        proof = await certify_apart(client.url, "demo:1", "base:1")
        taken = time.perf_counter() - start
    assert not proof.failures, proof.failures
    return taken


@contextmanager
def make_product(place: Path, number: int, size: int) -> Iterator[Path]:
    """The demo's model with our key (of a length that keeps the tensors aligned) and a tail."""
    path = place / f"product-{number}.gguf"
    data = refuser.files().model.read_bytes()
    count = struct.unpack_from("<Q", data, 16)[0]
    value = f"{number:0>57}".encode()
    entry = struct.pack("<Q", len(KEY)) + KEY + struct.pack("<IQ", 8, len(value)) + value
    assert len(entry) % 32 == 0
    with path.open("wb") as file:
        file.write(data[:16] + struct.pack("<Q", count + 1) + entry + data[24:])
        piece = os.urandom(1 << 24)
        for _ in range(size // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    try:
        yield path
    finally:
        path.unlink()


def _copy_and_hash(product: Path, copy: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", product, copy], check=True)
    subprocess.run(["sha256sum", product], check=True, capture_output=True)
    taken = time.perf_counter() - start
    copy.unlink()
    return taken


def _extra(fresh: set[Path], product: Path) -> float:
    """Bytes of the fresh blobs, the product itself apart."""
    return float(sum(blob.stat().st_blocks * 512 for blob in fresh if not blob.samefile(product)))


def _forget(blobs: Path, product: Path) -> None:
    """The link goes, so that the next registration has everything to do."""
    for blob in blobs.iterdir():
        if blob.samefile(product):
            blob.unlink()


def _side(url: str, product: Path, how: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.registration", "--side", how, "--url", url, "--product", str(product)]
    done = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


async def _register(url: str, product: Path, how: str) -> dict[str, float]:
    """In a process that has loaded what the daemon has: its app, and a client that has spoken once."""
    import abliterated.app  # noqa: F401 - what the daemon holds is in the figure's "before"

    async with OllamaClient(url, local=how == "linked") as client:
        base: Base = await describe_base(client, "base:1")
        name = f"made:{product.stem.rpartition('-')[2]}-{how}"
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, start = _memory("VmRSS"), time.perf_counter()
        done = await register(client, product, name, base)
        taken = time.perf_counter() - start
    assert done.linked is (how == "linked"), done
    return {"seconds": taken, "growth": _memory("VmHWM") - before}


def _memory(what: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return float(line.split()[1]) * 1024
    raise SystemExit("only Linux says how much memory a process held at most")


def _engines() -> tuple[Any, ...]:
    """The tests know how engines are found and started."""
    sys.path.insert(0, str(FOLDER / "tests"))
    found: tuple[Any, ...] = importlib.import_module("engines").find_engines()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller file, fewer rounds")
    parser.add_argument("--side", choices=("linked", "uploaded"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--product", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is None:
        figures = measure(options.quick)
        print(table(figures))
        print(json.dumps(figures, indent=2))
        return 0
    print(json.dumps(asyncio.run(_register(options.url, options.product, options.side))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
