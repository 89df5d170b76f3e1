"""A model from a hub of Hugging Face's kind: `hf:ORG/REPO[@REVISION]` becomes a folder with safetensors.

What is fetched: configuration, tokenizer, chat template, licence and the safetensors they name; never pickles, never
code. The revision is resolved to a commit once, and that commit is what is fetched and told. Everything lies in the
hub's own cache, shared with every other tool that uses it. Tokens appear in no message.
Does not know recipes' other models, nor what is done with the folder.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_session,
    hf_hub_url,
    metadata_load,
    snapshot_download,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling

# The package names these in a list its type checker's eye does not reach.
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, logging  # type: ignore[attr-defined]

from abliterate.contract.errors import AbliteratedError, ModelError, RecipeError
from abliterated.pipeline.hub_access import Hub, translated
from abliterated.pipeline.hub_download import Blob, download
from abliterated.pipeline.safe_write import need_space

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
TIMEOUT: Final = 10.0
_REFERENCE: Final = re.compile(r"(?:hf:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_DIGEST: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_KEPT_SUFFIXES: Final = frozenset({".json", ".jinja", ".model", ".tiktoken"})
_KEPT_NAMES: Final = frozenset({"merges.txt", "vocab.txt", "README.md"})
_KEPT_STEMS: Final = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


@dataclass(frozen=True)
class Fetched:
    """A model that is here. `commit`: forty hex digits; `licence`: as its card names it, "" where it names none."""

    folder: Path
    commit: str
    licence: str


def go_offline() -> None:
    """From here on this process neither asks a hub nor holds a token."""
    os.environ.pop("HF_TOKEN", None)
    os.environ.pop("CREDENTIALS_DIRECTORY", None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def fetch(
    reference: str,
    *,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
    hub: Hub | None = None,
) -> Fetched:
    """The model `hf:ORG/REPO[@REVISION]`, from the cache or the hub. Progress is in bytes still to come.

    Raises RecipeError, NotFound, HubDenied, HubUnavailable, ModelError, DiskError, Cancelled. Parts stay for later.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise RecipeError(f"{reference!r} is no repository", remedy="Write hf:ORG/REPO or hf:ORG/REPO@COMMIT")
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    errand = _Errand(hub or Hub.from_environment(), match[1], match[2] or "", cancelled)
    with errand.named():
        commit = errand.commit()
        folder = errand.snapshot(commit)
        if not errand.complete(commit):
            errand.fetch(commit, progress)
    return Fetched(folder, commit, _licence(folder))


def wanted(names: Iterable[str], index: Mapping[str, Any] | None) -> list[str]:
    """The files to fetch of a repository that holds `names`; `index`: its INDEX, where that is here. ModelError."""
    top = sorted(name for name in names if "/" not in name)
    if "config.json" not in top:
        remedy = "Name a repository with a transformers model: config.json beside safetensors"
        if any(name.endswith(".gguf") for name in top):
            remedy = 'It holds GGUF files: `ollama pull hf.co/ORG/REPO`, then model = "ollama:hf.co/ORG/REPO"'
        raise ModelError("it has no config.json", remedy=remedy)
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights:
        what = "only pickled weights" if any(name.endswith(_PICKLES) for name in top) else "no safetensors"
        raise ModelError(
            f"it holds {what}", remedy="Pickles are never loaded: name a repository or a revision with safetensors"
        )
    if index is not None:
        named = {str(name) for name in dict(index.get("weight_map") or {}).values()}
        absent = sorted(named.difference(weights))
        if absent or not named:
            lacking = absent[0] if absent else "a weight_map"
            raise ModelError(
                f"its {INDEX} and its files disagree: {lacking} is missing", remedy="Name another revision"
            )
        weights = sorted(named)
    elif SINGLE in weights:
        weights = [SINGLE]
    elif len(weights) > 1:
        raise ModelError(f"it holds {len(weights)} safetensors, but no {INDEX}", remedy="Name another repository")
    return [name for name in top if _kept(name)] + weights


def _kept(name: str) -> bool:
    path = Path(name)
    return path.suffix in _KEPT_SUFFIXES or name in _KEPT_NAMES or name.upper().startswith(_KEPT_STEMS)


@dataclass(frozen=True)
class _Errand:
    """One repository at one revision of one hub."""

    hub: Hub
    repository: str
    revision: str
    cancelled: Callable[[], bool]

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.hub.endpoint, token=self.hub.token or False)

    @property
    def storage(self) -> Path:
        return self.hub.cache.expanduser().resolve() / repo_folder_name(repo_id=self.repository, repo_type="model")

    def snapshot(self, commit: str) -> Path:
        return self.storage / "snapshots" / commit

    def commit(self) -> str:
        """What the revision means now; where the hub can't be asked, what it meant last."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        if not self.hub.offline:
            # The client itself waits for ever; everything it asks after this is bounded too.
            get_session().timeout = httpx2.Timeout(TIMEOUT)
        found = self.api.resolve_revision(
            self.repository,
            revision=self.revision or None,
            cache_dir=self.hub.cache,
            local_files_only=self.hub.offline,
        )
        return found.resolved

    def complete(self, commit: str) -> bool:
        """Whether the cache holds all of it. Without the hub's word for what belongs to it, weights must do."""
        folder = self.snapshot(commit)
        try:
            listed = get_cached_repo_tree(self.repository, revision=commit, cache_dir=self.hub.cache)
            names = [file.path for file in listed]
        except hub_errors.CachedRepoTreeNotFoundError:
            if not self.hub.offline:
                return False
            names = [path.name for path in folder.glob("*") if path.is_file()]
            if not names:
                return False
        if INDEX in names and not (folder / INDEX).is_file():
            return False
        return all((folder / name).is_file() for name in wanted(names, _index(folder / INDEX)))

    def fetch(self, commit: str, progress: Callable[[int, int], None]) -> None:
        """Bring what is missing, the index first: it says which safetensors are the model."""
        if self.hub.offline:
            raise ModelError(
                f"{self.repository} is not whole in the cache, and HF_HUB_OFFLINE is set",
                remedy="Unset HF_HUB_OFFLINE, or download it where there is a network",
            )
        get_session().timeout = httpx2.Timeout(TIMEOUT)
        # Not its tree: that request the client repeats for half a minute, deaf to a cancel.
        info = self.api.model_info(self.repository, revision=commit, files_metadata=True, timeout=TIMEOUT)
        listed = {entry.rfilename: entry for entry in info.siblings or ()}
        index = None
        if INDEX in listed:
            self._bring([listed[INDEX]], commit, lambda done, total: None)
            index = _index(self._blob(listed[INDEX], commit).target)
        files = [listed[name] for name in wanted(listed, index)]
        self._bring(files, commit, progress)
        # Every blob is there: the client itself writes refs, listing and links, and would mend what we missed.
        snapshot_download(
            self.repository,
            revision=commit,
            cache_dir=self.hub.cache,
            endpoint=self.hub.endpoint,
            token=self.hub.token or False,
            allow_patterns=[glob.escape(file.rfilename) for file in files],
        )

    def _bring(self, files: list[RepoSibling], commit: str, progress: Callable[[int, int], None]) -> None:
        blobs = list({blob.target: blob for blob in (self._blob(file, commit) for file in files)}.values())
        missing = sum(blob.size - blob.present() for blob in blobs)
        if missing:
            self.storage.joinpath("blobs").mkdir(parents=True, exist_ok=True)
            need_space(self.storage / self.repository.rpartition("/")[2], missing)
        headers = build_hf_headers(token=self.hub.token or False)
        download(blobs, headers, progress=progress, cancelled=self.cancelled)

    def _blob(self, file: RepoSibling, commit: str) -> Blob:
        digest, size = (file.lfs.sha256, file.lfs.size) if file.lfs else (file.blob_id, file.size)
        if digest is None or size is None or not _DIGEST.fullmatch(digest):
            raise ModelError(f"{self.hub.host} does not tell the digest of {file.rfilename}", remedy="Ask another hub")
        url = hf_hub_url(self.repository, file.rfilename, revision=commit, endpoint=self.hub.endpoint)
        return Blob(file.rfilename, url, size, digest, self.storage / "blobs" / digest)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Whatever the client, the network or the disk raises, as an error of ours that names the repository."""
        try:
            yield
        except AbliteratedError as error:
            if self.repository in error.message:
                raise
            raise type(error)(f"{self.repository}: {error.message}", remedy=error.remedy) from error
        except Exception as error:
            raise translated(error, self.hub, self.repository, self.revision) from error


def _index(path: Path) -> dict[str, Any] | None:
    """The index, None where there is none. ModelError where it is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelError(f"its {INDEX} is no JSON", remedy="Name another revision") from error
    if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
        raise ModelError(f"its {INDEX} has no weight_map", remedy="Name another revision")
    return found


def _licence(folder: Path) -> str:
    """The licence as the model card's front matter names it."""
    try:
        card = metadata_load(folder / "README.md") or {}
    except Exception:  # a card is prose: whatever is wrong with it, the model is still a model
        return ""
    named = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return str(named or card.get("license") or "")
