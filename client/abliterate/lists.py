"""Public lists of prompts: where each lies, under which licence, and how it becomes one prompt a line.

Fetched over https into a hidden file that a later try goes on with; visible only when whole. Does not ask anybody
whether the licence suits; does not know the command line.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

from abliterate.contract.errors import AbliteratedError, DiskError, EngineUnavailable

MOST_BYTES: Final = 64 << 20
TIMEOUT: Final = 30.0
_PIECE: Final = 64 * 1024
_RAW: Final = "https://raw.githubusercontent.com"
_HUB: Final = "https://huggingface.co/datasets"


@dataclass(frozen=True)
class PromptList:
    """A list. `column`: which of its columns is the prompt; `where`: rows that count, by another column's value."""

    name: str
    kind: Literal["harmful", "harmless"]
    about: str
    licence: str
    home: str
    url: str
    column: str
    where: tuple[str, str] = ("", "")


_JBB: Final = f"{_HUB}/JailbreakBench/JBB-Behaviors"
LISTS: Final = (
    PromptList(
        name="jbb-harmful",
        kind="harmful",
        about="JailbreakBench, misuse behaviours",
        licence="MIT",
        home=_JBB,
        url=f"{_JBB}/resolve/main/data/harmful-behaviors.csv",
        column="Goal",
    ),
    PromptList(
        name="jbb-benign",
        kind="harmless",
        about="JailbreakBench, the benign counterparts",
        licence="MIT",
        home=_JBB,
        url=f"{_JBB}/resolve/main/data/benign-behaviors.csv",
        column="Goal",
    ),
    PromptList(
        name="advbench",
        kind="harmful",
        about="AdvBench, harmful behaviours",
        licence="MIT",
        home="https://github.com/llm-attacks/llm-attacks",
        url=f"{_RAW}/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv",
        column="goal",
    ),
    PromptList(
        name="harmbench",
        kind="harmful",
        about="HarmBench, text behaviours",
        licence="MIT",
        home="https://github.com/centerforaisafety/HarmBench",
        url=f"{_RAW}/centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_all.csv",
        column="Behavior",
    ),
    PromptList(
        name="alpaca",
        kind="harmless",
        about="Stanford Alpaca, instructions that need no input",
        licence="CC-BY-NC-4.0",
        home="https://github.com/tatsu-lab/stanford_alpaca",
        url=f"{_RAW}/tatsu-lab/stanford_alpaca/main/alpaca_data.json",
        column="instruction",
        where=("input", ""),
    ),
    PromptList(
        name="xstest-safe",
        kind="harmless",
        about="XSTest, safe prompts that sound unsafe",
        licence="CC-BY-4.0",
        home="https://github.com/paul-rottger/xstest",
        url=f"{_RAW}/paul-rottger/xstest/main/xstest_prompts.csv",
        column="prompt",
        where=("label", "safe"),
    ),
)


class DownloadError(EngineUnavailable):
    """A list could not be fetched now; what has come is kept."""


def fetch(wanted: PromptList, folder: Path, tell: Callable[[int], None] = lambda _done: None) -> tuple[Path, int]:
    """The list as `folder/NAME.txt`, and how many prompts it has. Raises DownloadError, DiskError, ListError."""
    part, final = folder / f".{wanted.name}.part", folder / f"{wanted.name}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _download(wanted.url, part, tell)
        content = part.read_bytes()
        part.unlink()  # whole: whatever it is, there is nothing to go on with
        _mark(part).unlink(missing_ok=True)
        prompts = read_prompts(content, wanted)
        head = f"# {wanted.about}\n# licence: {wanted.licence}; from {wanted.home}\n"
        _write_whole(final, head + "".join(f"{prompt}\n" for prompt in prompts))
    except urllib.error.URLError as error:
        raise _failed(wanted, error) from error
    except (TimeoutError, ConnectionError, EOFError) as error:
        raise DownloadError(
            f"{wanted.url}: {error or 'it broke off'}", remedy="Run it again: it goes on there"
        ) from error
    except OSError as error:
        raise DiskError(
            f"{folder}: {error.strerror or error}", remedy="Name another folder with --output-dir"
        ) from error
    return final, len(prompts)


class ListError(AbliteratedError):
    """What came is not the list that was meant."""

    failure = "recipe"
    exit_code = 2


def read_prompts(content: bytes, wanted: PromptList) -> list[str]:
    """Its prompts, each on one line, each once, in order."""
    try:
        text = content.decode("utf-8-sig")
        rows = json.loads(text) if text.lstrip()[:1] == "[" else list(csv.DictReader(io.StringIO(text)))
        key, value = wanted.where
        found = [str(row[wanted.column]) for row in rows if not key or str(row.get(key) or "") == value]
        if not found:
            raise ValueError("no prompts")
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, RecursionError) as error:
        raise ListError(
            f"{wanted.url}: not the list it was ({type(error).__name__}: {error})", remedy=f"See {wanted.home}"
        ) from error
    lines = [" ".join(prompt.split()) for prompt in found]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


class _HttpsStays(urllib.request.HTTPRedirectHandler):
    """A redirect that leaves https is not followed."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"it leads to {newurl}, which is no https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, part: Path, tell: Callable[[int], None]) -> None:
    """Fetch `url` into `part`, going on where an earlier try stopped if the server still has the same file."""
    have = part.stat().st_size if part.exists() else 0
    mark = _mark(part).read_text() if have and _mark(part).exists() else ""
    request = urllib.request.Request(url, headers={"User-Agent": "abliterate"})  # noqa: S310 - ours, https
    if have and mark:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", mark)
    opener = urllib.request.build_opener(_HttpsStays)
    try:
        answer = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        part.unlink()  # longer than what is there now: another file
        answer = opener.open(urllib.request.Request(url, headers={"User-Agent": "abliterate"}), timeout=TIMEOUT)  # noqa: S310
    with answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if answer.status == 206 and not goes_on:
            raise ConnectionError("the server sent another part than was asked for")
        if not goes_on:
            _mark(part).write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        with part.open("ab" if goes_on else "wb") as file:
            _copy(answer, file, have if goes_on else 0, tell)


def _copy(answer: Any, file: IO[bytes], done: int, tell: Callable[[int], None]) -> None:
    length = answer.headers.get("Content-Length")
    whole = done + int(length) if length and length.isdigit() else None
    while piece := answer.read(_PIECE):
        done += len(piece)
        if done > MOST_BYTES:
            raise ConnectionError("it is far longer than such a list")
        file.write(piece)
        tell(done)
    file.flush()
    os.fsync(file.fileno())
    if whole is not None and done < whole:
        raise EOFError(f"it broke off at {done} of {whole} bytes")


def _failed(wanted: PromptList, error: urllib.error.URLError) -> DownloadError:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return DownloadError(f"{wanted.url}: the server answered {error.code}", remedy=f"See {wanted.home}")
    return DownloadError(f"{wanted.url}: {error.reason}", remedy="Check the network and run it again")


def _mark(part: Path) -> Path:
    return part.with_suffix(".mark")


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
