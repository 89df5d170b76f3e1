"""Which hub is asked and with which token, and what its refusals mean to a person.

Every exception of the hub's client, the network and the disk becomes an error of ours with a remedy; none tells a
token. Does not know what is fetched, nor how.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub import errors as hub_errors

from abliterate.contract.errors import AbliteratedError, DiskError, ModelError, NotFound
from abliterated.pipeline.hub_download import Incomplete

CREDENTIAL: Final = "hf_token"
_TOKEN: Final = re.compile(r"hf_[A-Za-z0-9]{8,}")


class HubDenied(AbliteratedError):
    """The hub wants a token, another token, or its terms accepted."""

    failure = "auth"
    exit_code = 3


class HubUnavailable(AbliteratedError):
    """The hub does not answer now; trying again later goes on where it stopped."""

    failure = "timeout"
    exit_code = 75


@dataclass(frozen=True)
class Hub:
    """Which hub is asked, with which token, into which cache; `offline`: only the cache is asked."""

    endpoint: str
    cache: Path
    token: str = field(default="", repr=False)
    offline: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Hub:
        """As HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE said when the process began."""
        return cls(constants.ENDPOINT, Path(constants.HF_HUB_CACHE), find_token(environ), constants.HF_HUB_OFFLINE)

    @property
    def host(self) -> str:
        """What it is called in messages."""
        return self.endpoint.rpartition("://")[2].rpartition("@")[2]


def find_token(environ: Mapping[str, str]) -> str:
    """The token of $HF_TOKEN, of the service manager's credential `hf_token`, or of an earlier `hf auth login`."""
    if token := environ.get("HF_TOKEN", "").strip():
        return token
    if folder := environ.get("CREDENTIALS_DIRECTORY"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if token := (Path(folder) / CREDENTIAL).read_text(encoding="utf-8").strip():
                return token
    return (get_token() or "").strip()


def translated(error: Exception, hub: Hub, name: str, revision: str) -> AbliteratedError:
    """The error as ours: what failed, on which repository, and what to do."""
    host = hub.host
    match error:
        case hub_errors.GatedRepoError() if hub.token:
            return HubDenied(
                f"{name} is gated, and this token's owner has no access",
                remedy=f"Accept its terms at {host}/{name}, or give another token",
            )
        case hub_errors.GatedRepoError():
            return HubDenied(
                f"{name} is gated",
                remedy=f"Accept its terms at {host}/{name}, then give a token: HF_TOKEN, "
                f"or a credential file {CREDENTIAL}",
            )
        case hub_errors.RevisionNotFoundError():
            return NotFound(f"{name} has no revision {revision!r}", remedy="Name a branch, a tag or a whole commit")
        case hub_errors.RepositoryNotFoundError() if hub.token:
            return NotFound(
                f"{host} has no {name} that this token may see", remedy="Check its name, or give another token"
            )
        case hub_errors.RepositoryNotFoundError():
            return NotFound(
                f"{host} has no {name}, or it is private",
                remedy=f"Check its name; a private one needs a token: HF_TOKEN, or a credential file {CREDENTIAL}",
            )
        case hub_errors.DisabledRepoError():
            return HubDenied(f"{host} has disabled {name}", remedy="Name another repository")
        case hub_errors.RevisionResolutionError() | hub_errors.LocalEntryNotFoundError() if hub.offline:
            return ModelError(
                f"{name} is not in the cache, and HF_HUB_OFFLINE is set",
                remedy="Unset HF_HUB_OFFLINE, or download it where there is a network",
            )
        case hub_errors.HfHubHTTPError():
            return _answered(error.response.status_code, hub, name)
        case Incomplete() | httpx2.HTTPError() | hub_errors.RevisionResolutionError():
            return HubUnavailable(
                f"{host} does not answer, or breaks off: {name} is not here yet",
                remedy="Check the network, or HF_ENDPOINT; what was fetched is kept",
            )
        case hub_errors.LocalEntryNotFoundError():
            return HubUnavailable(
                f"{host} lists the files of {name}, but does not give them",
                remedy="Try again later, or check HF_ENDPOINT",
            )
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskError(
                f"the disk is full: {name} does not fit into the cache",
                remedy="Make room, or set HF_HOME to another disk; what was fetched is kept",
            )
        case OSError():
            return DiskError(
                f"{name} can't be written into the cache: {error.strerror or _redacted(error, hub)}",
                remedy="Check the rights of the folder HF_HOME names",
            )
    return ModelError(
        f"{name} can't be fetched from {host}: {_redacted(error, hub)}", remedy="Check its name, and HF_ENDPOINT"
    )


def _answered(status: int, hub: Hub, name: str) -> AbliteratedError:
    host = hub.host
    if status in (401, 403):
        what = "this token" if hub.token else "anyone without a token"
        return HubDenied(
            f"{host} refuses {name} to {what} ({status})",
            remedy=f"Give a token that may read it: HF_TOKEN, or a credential file {CREDENTIAL}",
        )
    if status == 404:
        return NotFound(f"{host} lacks a file of {name} that it lists", remedy="Try again later")
    return HubUnavailable(f"{host} answers {status} for {name}", remedy="Try again later; what was fetched is kept")


def _redacted(error: Exception, hub: Hub) -> str:
    """A library's message, in one line and without a token."""
    line = str(error).strip().partition("\n")[0][:300]
    if hub.token:
        line = line.replace(hub.token, "hf_…")
    return _TOKEN.sub("hf_…", line)
