"""Blobs: asked for, uploaded, verified, stored under their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import httpx
import pytest

from contract.cases import Blob
from engines import RunningEngine


def test_a_blob_is_absent_then_created_then_there(
    http: httpx.Client, files: dict[str, Blob], running: RunningEngine
) -> None:
    blob = files["unseen"]
    assert http.head(f"/api/blobs/{blob.digest}").status_code == 404
    created = http.post(f"/api/blobs/{blob.digest}", content=blob.path.read_bytes())
    assert (created.status_code, created.content) == (201, b"")
    assert http.head(f"/api/blobs/{blob.digest}").status_code == 200
    stored = running.models / "blobs" / blob.digest.replace(":", "-")
    assert stored.read_bytes() == blob.path.read_bytes()


def test_a_blob_that_is_there_is_200_without_asking_for_its_bytes(
    http: httpx.Client, uploaded: dict[str, Blob]
) -> None:
    assert http.post(f"/api/blobs/{uploaded['plain'].digest}", content=b"").status_code == 200


def test_a_blob_may_come_in_chunks_of_unknown_number(http: httpx.Client) -> None:
    pieces = [bytes([number]) * 40_000 for number in range(8)]
    digest = hashlib.sha256(b"".join(pieces)).hexdigest()

    def stream() -> Iterator[bytes]:
        yield from pieces

    assert http.post(f"/api/blobs/sha256:{digest}", content=stream()).status_code == 201
    assert http.head(f"/api/blobs/sha256-{digest}").status_code == 200, "the digest with a dash is the same blob"


def test_bytes_of_another_digest_are_refused_and_leave_nothing(http: httpx.Client, running: RunningEngine) -> None:
    wanted, sent = "sha256:" + "ab" * 32, b"something else"
    answer = http.post(f"/api/blobs/{wanted}", content=sent)
    got = "sha256:" + hashlib.sha256(sent).hexdigest()
    assert answer.status_code == 400
    assert answer.json() == {"error": f'digest mismatch, expected "{wanted}", got "{got}"'}
    assert http.head(f"/api/blobs/{wanted}").status_code == 404
    assert not (running.models / "blobs" / wanted.replace(":", "-")).exists()


@pytest.mark.parametrize("digest", ["nonsense", "sha256:12", "md5:" + "0" * 64])
def test_what_is_no_digest_is_400(http: httpx.Client, digest: str) -> None:
    assert http.head(f"/api/blobs/{digest}").status_code == 400
    answer = http.post(f"/api/blobs/{digest}", content=b"x")
    assert (answer.status_code, answer.json()) == (400, {"error": "invalid digest format"})
