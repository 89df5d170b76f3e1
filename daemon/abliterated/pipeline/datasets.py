"""Prompts out of a data set of the hub: `hf:ORG/NAME[@REVISION]#COLUMN` becomes the texts of one column.

Reads Parquet, JSON, JSON Lines, CSV and text; never runs code that came with a data set. Files lie in the hub's own
cache. What is fetched once is read again without a network. Does not know what prompts are for.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
from huggingface_hub import HfApi, get_session, hf_hub_download, metadata_load
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from abliterate.contract.errors import AbliteratedError, Cancelled, ModelError, RecipeError
from abliterated.pipeline.hub_access import Hub, HubUnavailable, translated

TIMEOUT: Final = 10.0
# The best first: one kind is read, the others say the same again.
SUFFIXES: Final = (".parquet", ".jsonl", ".json", ".csv", ".txt")
# Beside these, files of a data set's own housekeeping.
NO_DATA: Final = frozenset({"dataset_info.json", "dataset_infos.json", "config.json", "requirements.txt"})
LARGEST: Final = 512 << 20
MOST: Final = 50_000
_REFERENCE: Final = re.compile(r"hf:((?:[\w.-]+/)?[\w.-]+)(?:@([\w./-]+))?#(.+)")


@dataclass(frozen=True)
class Column:
    """The texts, and where they are from. `licence`: as the card names it, "" where it names none."""

    texts: tuple[str, ...]
    name: str
    revision: str
    licence: str


def parse_reference(reference: str) -> tuple[str, str, str]:
    """Repository, revision ("" for the newest) and column. RecipeError where it is none."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise RecipeError(f"{reference!r} names no column of a data set", remedy="Write hf:ORG/NAME#COLUMN")
    return match[1], match[2] or "", match[3]


def read_column(reference: str, *, hub: Hub | None = None, cancelled: Callable[[], bool] = lambda: False) -> Column:
    """The column, fetched where it is not here yet. Raises RecipeError, ModelError, and what the hub refuses."""
    repository, _, column = parse_reference(reference)
    here = hub or Hub.from_environment()
    folder = fetch_dataset(reference, hub=here, cancelled=cancelled)
    texts: list[str] = []
    for path in data_files(sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())):
        texts += _read(folder / path, column, f"hf:{repository}")
        if len(texts) >= MOST:
            break
    found = tuple(dict.fromkeys(line for text in texts[:MOST] if (line := text.strip())))
    if not found:
        raise ModelError(f"hf:{repository}: the column {column!r} is empty", remedy="Name another column")
    return Column(found, f"hf:{repository}#{column}", folder.name, _licence(folder))


def fetch_dataset(reference: str, *, hub: Hub, cancelled: Callable[[], bool] = lambda: False) -> Path:
    """The folder in the cache that holds its data files. Raises what the hub refuses, ModelError, Cancelled."""
    repository, revision, _ = parse_reference(reference)
    storage = hub.cache.expanduser().resolve() / repo_folder_name(repo_id=repository, repo_type="dataset")
    if hub.offline:
        return _cached(storage, repository, revision)
    disable_progress_bars()
    try:
        get_session().timeout = httpx2.Timeout(TIMEOUT)
        api = HfApi(endpoint=hub.endpoint, token=hub.token or False)
        info = api.dataset_info(repository, revision=revision or None, files_metadata=True, timeout=TIMEOUT)
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
        files = data_files(sizes)
        if not files:
            raise ModelError(
                f"hf:{repository} holds no Parquet, JSON, CSV or text",
                remedy="Name another data set; loading scripts are never run",
            )
        if sum(sizes[file] for file in files) > LARGEST:
            raise ModelError(
                f"hf:{repository} is larger than {LARGEST >> 20} MB", remedy="Give a file with the prompts you want"
            )
        for name in [*files, *(["README.md"] if "README.md" in sizes else [])]:
            if cancelled():
                raise Cancelled("the run was asked to stop", remedy="Submit it again to go on where it stopped")
            hf_hub_download(
                repository,
                name,
                repo_type="dataset",
                revision=info.sha,
                cache_dir=hub.cache,
                endpoint=hub.endpoint,
                token=hub.token or False,
            )
        if revision and info.sha:
            _remember(storage, revision, info.sha)
        elif info.sha:
            _remember(storage, "main", info.sha)
    except AbliteratedError:
        raise
    except Exception as error:
        failure = translated(error, hub, repository, revision)
        if isinstance(failure, HubUnavailable):
            try:
                return _cached(storage, repository, revision)
            except ModelError:
                pass
        raise failure from error
    return storage / "snapshots" / str(info.sha)


def data_files(names: Iterable[str]) -> list[str]:
    """Of a data set's files those to read: of the best kind there is, and of the training part where there are
    several."""
    useful = [name for name in sorted(names) if Path(name).name not in NO_DATA and not Path(name).name.startswith(".")]
    for suffix in SUFFIXES:
        found = [name for name in useful if name.endswith(suffix)]
        if found:
            training = [name for name in found if re.search(r"(^|[/_.-])train", name)]
            return training or found
    return []


def _cached(storage: Path, repository: str, revision: str) -> Path:
    """What an earlier run fetched."""
    reference = storage / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = storage / "snapshots" / commit
    if not commit or not folder.is_dir():
        raise ModelError(
            f"hf:{repository} is not here yet, and there is no network", remedy="Fetch it where there is one"
        )
    return folder


def _remember(storage: Path, revision: str, commit: str) -> None:
    reference = storage / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)


def _read(path: Path, column: str, name: str) -> list[str]:
    """One file's column."""
    try:
        if path.suffix == ".parquet":
            return _parquet(path, column, name)
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".txt":
            return text.splitlines()
        if path.suffix == ".csv":
            csv.field_size_limit(1 << 24)
            return _texts(list(csv.DictReader(io.StringIO(text))), column, name)
        if path.suffix == ".jsonl":
            return _texts([json.loads(line) for line in text.splitlines() if line.strip()], column, name)
        return _texts(_rows(_json(text)), column, name)
    except (ValueError, csv.Error, OSError) as error:
        raise ModelError(f"{name}: {path.name} can't be read ({error})", remedy="Name another data set") from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # lines under a name that doesn't say so
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _rows(value: Any) -> Sequence[Any]:
    """Rows, whichever way a JSON file holds them."""
    if isinstance(value, dict):
        lists = {key: some for key, some in value.items() if isinstance(some, list)}
        if len(lists) == len(value) > 0 and not any(isinstance(one, dict) for some in lists.values() for one in some):
            return [dict(zip(lists, row, strict=False)) for row in zip(*lists.values(), strict=False)]
        return next(iter(lists.values()), [])
    return value if isinstance(value, list) else []


def _parquet(path: Path, column: str, name: str) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"{name} is Parquet, which needs pyarrow", remedy="pip install 'abliterated[pipeline]', or give a text file"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise _no_column(column, file.schema_arrow.names, name)
        values = file.read(columns=[column])[column].to_pylist()
    except ArrowException as error:
        raise ModelError(f"{name}: {path.name} can't be read ({error})", remedy="Name another data set") from error
    return _texts([{column: value} for value in values], column, name)


def _texts(rows: Sequence[Any], column: str, name: str) -> list[str]:
    """The column's text of each row: itself, or what the user says first in a conversation."""
    tables = [row for row in rows if isinstance(row, Mapping)]
    if tables and not any(column in row for row in tables):
        raise _no_column(column, sorted({key for row in tables[:100] for key in row}), name)
    found = []
    for row in tables:
        value = row.get(column)
        if isinstance(value, list | tuple):
            turns = [turn for turn in value if isinstance(turn, Mapping)]
            said = [turn for turn in turns if turn.get("role", turn.get("from")) in ("user", "human")]
            value = (said[0].get("content") or said[0].get("value")) if said else None
        if isinstance(value, str):
            found.append(value)
    return found


def _no_column(column: str, there: Sequence[str], name: str) -> RecipeError:
    listed = ", ".join(map(str, there[:12])) or "none"
    return RecipeError(f"{name} has no column {column!r}", remedy=f"It has: {listed}")


def _licence(folder: Path) -> str:
    try:
        card = metadata_load(folder / "README.md") or {}
    except Exception:  # a card is prose: whatever is wrong with it, the data is still data
        return ""
    named = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return ", ".join(map(str, named)) if isinstance(named, list) else str(named or "")
