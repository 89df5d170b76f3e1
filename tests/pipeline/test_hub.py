"""A model from a hub: what is fetched and what is not, how it goes on after a cut, what each refusal tells."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from abliterate.contract.errors import AbliteratedError, Cancelled, DiskError, ModelError, NotFound, RecipeError
from abliterated.pipeline import hub as hub_module
from abliterated.pipeline import hub_download
from abliterated.pipeline.hub import fetch, wanted
from abliterated.pipeline.hub_access import Hub, HubDenied, HubUnavailable, find_token
from abliterated.pipeline.source import open_source
from pipeline.hub_server import COMMIT, Faults, LocalHub, begun

TOKEN = "hf_thisIsASecretOfTheTests1234"
CARD = b"---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "max_position_embeddings": 64}


def weights(seed: int, size: int = 300_000) -> bytes:
    return save({f"t{seed}": np.random.default_rng(seed).standard_normal(size).astype(np.float32)})


def repository(**more: bytes) -> dict[str, bytes]:
    shards = {f"model-0000{n}-of-00002.safetensors": weights(n) for n in (1, 2)}
    index = {"weight_map": {"t1": "model-00001-of-00002.safetensors", "t2": "model-00002-of-00002.safetensors"}}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE": b"Apache License",
        "README.md": CARD,
        "model.safetensors.index.json": json.dumps(index).encode(),
        **shards,
        "consolidated.safetensors": weights(3),
        "pytorch_model.bin": b"\x80\x04never",
        "modeling_custom.py": b"raise SystemExit",
        "original/params.json": b"{}",
        **more,
    }


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hub_download, "FIRST_DELAY", 0.002)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def server() -> Iterator[LocalHub]:
    with LocalHub(repository()).running() as running:
        yield running


@pytest.fixture
def asked(server: LocalHub, tmp_path: Path) -> Hub:
    return Hub(server.endpoint, tmp_path / "hub")


def get(
    hub: Hub,
    reference: str = "hf:org/model",
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
):
    return fetch(reference, progress=progress, cancelled=cancelled, hub=hub)


def test_the_commit_is_resolved_and_the_model_s_files_alone_are_fetched(server: LocalHub, asked: Hub) -> None:
    seen: list[tuple[int, int]] = []
    fetched = get(asked, progress=lambda done, total: seen.append((done, total)))
    assert (fetched.commit, fetched.licence, fetched.folder.name) == (COMMIT, "apache-2.0", COMMIT)
    assert sorted(path.name for path in fetched.folder.iterdir()) == [
        "LICENSE", "README.md", "chat_template.jinja", "config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    for path in fetched.folder.iterdir():
        assert path.read_bytes() == server.files[path.name]
    for name in ("consolidated.safetensors", "pytorch_model.bin", "modeling_custom.py", "original/params.json"):
        assert server.sent(name) == 0
    names = {path.name for path in fetched.folder.iterdir()} - {"model.safetensors.index.json"}
    assert seen[-1] == (sum(len(server.files[name]) for name in names),) * 2
    assert seen == sorted(seen)
    source = open_source(fetched.folder)
    assert (source.kind, source.layers, len(source.parts)) == ("safetensors", 2, 2)
    assert not list(asked.cache.rglob("*.incomplete"))


def test_what_is_here_is_not_fetched_again_and_the_hub_s_own_client_finds_it(server: LocalHub, asked: Hub) -> None:
    first = get(asked)
    before = len(server.requests)
    assert get(asked) == first
    assert [request.path for request in server.requests[before:]] == ["/api/models/org/model"]
    before = len(server.requests)
    assert get(asked, f"hf:org/model@{COMMIT}") == first
    assert len(server.requests) == before
    found = huggingface_hub.hf_hub_download("org/model", "config.json", cache_dir=asked.cache, local_files_only=True)
    assert Path(found) == first.folder / "config.json"


def test_without_a_network_the_cache_answers_for_branch_and_commit(server: LocalHub, asked: Hub) -> None:
    first = get(asked)
    server.stop()
    offline = Hub(asked.endpoint, asked.cache, offline=True)
    assert get(offline) == get(offline, f"hf:org/model@{COMMIT}") == first
    huggingface_hub.close_session()
    assert get(asked) == first  # not told to be offline, but so it is


def test_offline_what_is_missing_is_said_without_asking(server: LocalHub, asked: Hub, tmp_path: Path) -> None:
    empty = Hub(asked.endpoint, tmp_path / "empty", offline=True)
    with pytest.raises(ModelError, match="org/model is not in the cache, and HF_HUB_OFFLINE is set"):
        get(empty)
    fetched = get(asked)
    (fetched.folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="not whole in the cache"):
        get(Hub(asked.endpoint, asked.cache, offline=True))
    before = len(server.requests)
    get(asked)
    assert server.requests[before:]
    assert not any(request.server == "cdn" for request in server.requests[before:])  # the blob was still there


def test_cut_connections_go_on_where_they_broke(server: LocalHub, asked: Hub) -> None:
    name = "model-00001-of-00002.safetensors"
    size = len(server.files[name])
    server.faults.cut = {name: [400_000, 0, 300_000, 1]}
    fetched = get(asked)
    assert (fetched.folder / name).read_bytes() == server.files[name]
    assert server.sent(name) == size
    assert [one.range for one in server.gets(name)] == ["", "bytes=400000-", "bytes=700000-", "bytes=700001-"]


def test_a_later_process_goes_on_too(server: LocalHub, asked: Hub) -> None:
    name, size = "model-00002-of-00002.safetensors", len(server.files["model-00002-of-00002.safetensors"])
    server.faults.cut = {name: [500_000, *[0] * 20]}
    with pytest.raises(HubUnavailable, match="breaks off") as raised:
        get(asked)
    assert "kept" in raised.value.remedy
    assert not (asked.cache / "models--org--model" / "snapshots" / COMMIT / name).exists()
    server.faults.cut = {}
    seen: list[tuple[int, int]] = []
    fetched = get(asked, progress=lambda done, total: seen.append((done, total)))
    assert (fetched.folder / name).read_bytes() == server.files[name]
    assert server.sent(name) == size
    assert seen[-1][1] <= size - 500_000


def test_a_server_that_ignores_ranges_or_has_a_shorter_file_is_read_from_its_beginning(
    server: LocalHub, asked: Hub
) -> None:
    name = "model-00001-of-00002.safetensors"
    server.faults = Faults(cut={name: [400_000]}, ignore_range=True)
    assert (get(asked).folder / name).read_bytes() == server.files[name]
    assert server.sent(name) == 400_000 + len(server.files[name])


def test_content_that_is_not_what_was_announced_never_gets_a_name(server: LocalHub, asked: Hub) -> None:
    name = "model-00001-of-00002.safetensors"
    server.faults.spoil = {name: 1}
    assert (get(asked).folder / name).read_bytes() == server.files[name]
    assert server.sent(name) == 2 * len(server.files[name])
    blob = (get(asked).folder / name).resolve()
    blob.unlink()
    server.faults.spoil = {name: 9}
    with pytest.raises(ModelError, match=f"org/model: {name} arrives with the wrong content"):
        get(asked)
    assert not blob.exists()


def test_a_busy_hub_is_asked_again(server: LocalHub, asked: Hub) -> None:
    server.faults.statuses = [503, 429, 500]
    assert get(asked).commit == COMMIT


def test_a_cancelled_download_keeps_its_parts(server: LocalHub, asked: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults.hold = threading.Event()

    def parts() -> list[Path]:
        # The small files may have come whole; a part of the weights is what must be kept.
        return begun(asked.cache, 50_000)

    with monkeypatch.context() as patch, pytest.raises(Cancelled):
        patch.setattr(hub_module, "TIMEOUT", 2.0)  # the server holds its connections open in silence
        get(asked, cancelled=lambda: bool(parts()))
    assert parts()
    server.faults.hold.set()
    server.faults.hold = None
    before = len(server.requests)
    assert get(asked).commit == COMMIT
    assert any(one.range for one in server.requests[before:])
    assert not list(asked.cache.rglob("*.incomplete"))


def test_the_token_goes_to_the_hub_and_not_to_the_server_it_names(server: LocalHub, asked: Hub) -> None:
    server.faults.token = TOKEN
    get(Hub(asked.endpoint, asked.cache, token=TOKEN))
    assert {one.authorization for one in server.requests if one.server == "hub"} == {f"Bearer {TOKEN}"}
    assert {one.authorization for one in server.requests if one.server == "cdn"} == {""}


def test_refusals_say_what_to_do_and_never_the_token(server: LocalHub, asked: Hub, tmp_path: Path) -> None:
    with_token = Hub(asked.endpoint, tmp_path / "other", token=TOKEN)
    told: list[AbliteratedError] = []

    def refused(kind: type[AbliteratedError], said: str, hub: Hub, reference: str = "hf:org/model") -> None:
        with pytest.raises(kind, match=said) as raised:
            get(hub, reference)
        told.append(raised.value)

    server.faults.gated = True
    refused(HubDenied, r"org/model is gated\. Accept", asked)
    refused(HubDenied, "gated, and this token's owner has no access", with_token)
    server.faults = Faults(token="hf_anotherTokenAltogether99")
    refused(NotFound, "has no org/model, or it is private", asked)
    refused(HubDenied, r"refuses org/model to this token \(401\)", with_token)
    server.faults = Faults()
    refused(NotFound, "org/model has no revision 'v9'", asked, "hf:org/model@v9")
    refused(NotFound, "has no org/nothing", asked, "hf:org/nothing")
    refused(NotFound, "has no org/nothing that this token may see", with_token, "hf:org/nothing")
    server.faults = Faults(disabled=True)
    refused(HubDenied, "has disabled org/model", asked)
    server.faults = Faults(portal=True)
    refused(ModelError, "org/model can't be fetched from 127", asked)
    server.faults = Faults()
    refused(RecipeError, "no repository", asked, "hf:nothing")
    server.stop()
    huggingface_hub.close_session()
    refused(HubUnavailable, "does not answer", Hub(asked.endpoint, tmp_path / "third", token=TOKEN))
    for error in told:
        assert error.remedy
        assert TOKEN not in str(error) + repr(error)
    assert {error.failure for error in told if isinstance(error, HubDenied)} == {"auth"}
    assert TOKEN not in repr(with_token)


def test_a_hub_that_goes_back_on_its_word_is_named(server: LocalHub, asked: Hub, tmp_path: Path) -> None:
    weights = "model-00001-of-00002.safetensors"
    for number, (faults, kind, said, remedy) in enumerate(
        (
            (Faults(statuses=[404] * 99), NotFound, "lacks a file of org/model that it lists", "later"),
            (Faults(statuses=[503] * 99), HubUnavailable, "answers 503 for org/model", "what was fetched is kept"),
            (Faults(untold="config.json"), ModelError, "does not tell the digest of config.json", "another hub"),
            (Faults(understated=weights), ModelError, f"{weights} is longer than the hub announced", "later"),
        )
    ):
        server.faults = faults
        with pytest.raises(kind, match=said) as raised:
            get(Hub(asked.endpoint, tmp_path / str(number)))
        assert remedy in raised.value.remedy
        assert not list((tmp_path / str(number)).rglob("*.safetensors"))


def test_repositories_without_a_model_to_edit_are_named(server: LocalHub, asked: Hub) -> None:
    for files, said, remedy in (
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "org/model: it holds only pickled weights", "safetensors"),
        ({"config.json": b"{}"}, "org/model: it holds no safetensors", "safetensors"),
        ({"model.Q4_K_M.gguf": b"GGUF", "README.md": CARD}, "org/model: it has no config.json", "ollama pull"),
        ({"config.json": b"{}", "a.safetensors": b"1", "b.safetensors": b"2"}, "2 safetensors, but no", "repository"),
        (repository() | {"model.safetensors.index.json": b"[]"}, "has no weight_map", "revision"),
        (repository() | {"model.safetensors.index.json": b"{"}, "index.json is no JSON", "revision"),
    ):
        server.files = files
        with pytest.raises(ModelError, match=said) as raised:
            get(asked)
        assert remedy in raised.value.remedy
        assert not [one for one in server.requests if one.path.endswith(".safetensors") and one.sent]


def test_a_disk_without_room_is_told_before_a_byte_travels(
    server: LocalHub, asked: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    real = os.statvfs

    def nearly_full(path: object) -> os.statvfs_result:
        fields = list(real(path))  # type: ignore[call-overload]
        fields[4] = 8  # free blocks
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(DiskError, match="org/model"):
        get(asked)
    assert not [one for one in server.requests if one.server == "cdn"]


def test_a_disk_that_fills_up_leaves_parts_and_no_names(server: LocalHub, asked: Hub) -> None:
    import resource
    import signal

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(DiskError, match="org/model can't be written"):
            get(asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert not list(asked.cache.rglob("*.safetensors"))
    name = "model-00001-of-00002.safetensors"
    assert (get(asked).folder / name).read_bytes() == server.files[name]


def test_two_runs_at_once_fetch_each_byte_once(server: LocalHub, asked: Hub) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(get(asked).folder)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert server.sent(name) == len(server.files[name])


def test_the_index_says_which_safetensors_are_the_model() -> None:
    names = ["config.json", "model.safetensors", "model.fp16.safetensors", "training_args.bin", "a/config.json"]
    assert wanted(names, None) == ["config.json", "model.safetensors"]
    assert wanted(["config.json", "x.safetensors"], None) == ["config.json", "x.safetensors"]
    for index in ({}, {"weight_map": {"t": "../elsewhere.safetensors"}}, {"weight_map": {"t": "gone.safetensors"}}):
        with pytest.raises(ModelError, match="disagree"):
            wanted(names, index)


def test_the_token_is_the_environment_s_then_the_credential_s_then_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    (tmp_path / "hf_token").write_text(f"{TOKEN}\n")
    credential = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert find_token({"HF_TOKEN": " hf_mine ", **credential}) == "hf_mine"
    assert find_token(credential) == TOKEN
    assert find_token({"CREDENTIALS_DIRECTORY": str(tmp_path / "none")}) == ""
