"""Headers fetched by range requests from a stand-in server on this machine."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from spac.errors import ModelFileError
from spac.gguf import remote
from spac.gguf.check import check_model
from tests.ranges import serve


@pytest.fixture
def hub(tmp_path: Path, model_path: Path) -> Iterator[Any]:
    folder = tmp_path / "owner/repo/resolve/main"
    folder.mkdir(parents=True)
    (folder / "model.gguf").symlink_to(model_path)
    with serve(tmp_path) as server:
        server.folder = folder
        server.model = f"{server.url}/owner/repo/resolve/main/model.gguf"
        yield server


def failure(model: str) -> str:
    with pytest.raises(ModelFileError) as caught, remote.headers_of(model):
        pass
    text = str(caught.value)
    assert "\n" not in text
    assert "spac-header-" not in text  # where the copy was
    return text


def test_a_remote_model_has_the_facts_of_the_local_one(hub: Any, model_path: Path) -> None:
    with remote.headers_of(hub.model) as (paths, facts):
        assert facts == dataclasses.replace(check_model(model_path), path=hub.model, parts=(hub.model,))
        status = Path(paths[0]).stat()
        assert status.st_size == model_path.stat().st_size
    assert not Path(paths[0]).exists()


def test_only_the_header_is_fetched(hub: Any, model_path: Path) -> None:
    with remote.headers_of(hub.model) as (paths, facts):
        begin = Path(paths[0]).read_bytes()[: facts.vocabulary_bytes]
    assert begin == model_path.read_bytes()[: facts.vocabulary_bytes]
    assert sum(n for _, _, n in hub.sent) <= 2 * remote.FIRST_BYTES


def test_a_long_header_takes_few_requests(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 1 << 12)
    with remote.headers_of(hub.model) as (_, facts):
        pass
    assert [begin for _, begin, _ in hub.sent][:2] == [0, 1 << 12]
    assert len(hub.sent) <= 2 + (facts.vocabulary_bytes >> 12).bit_length()


def test_a_hub_name_goes_where_the_variable_says(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    with remote.headers_of("hf:owner/repo/model.gguf") as (_, facts):
        assert facts.path == hub.model


@pytest.mark.parametrize(
    ("model", "url"),
    [
        ("hf:a/b/c.gguf", "https://huggingface.co/a/b/resolve/main/c.gguf"),
        ("hf:a/b/folder/c d.gguf".replace(" ", "%"), "https://huggingface.co/a/b/resolve/main/folder/c%25d.gguf"),
        ("hf:a/b@v1.0/c.gguf", "https://huggingface.co/a/b/resolve/v1.0/c.gguf"),
        ("https://host/c.gguf?download=true", "https://host/c.gguf?download=true"),
    ],
)
def test_names_are_resolved(model: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert remote.resolve(model) == url


@pytest.mark.parametrize("model", ["hf:", "hf:owner/repo", "hf:owner/repo/model.bin", "https://", "http:///x.gguf"])
def test_names_without_a_meaning(model: str) -> None:
    assert model in failure(model)


def test_a_bad_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "ftp://x")
    assert "HF_ENDPOINT" in failure("hf:owner/repo/model.gguf")


def write_parts(folder: Path, *, n: int = 2) -> None:
    for number in range(n):
        writer = gguf.GGUFWriter(folder / f"split-{number + 1:05d}-of-{n:05d}.gguf", "qwen3moe")
        writer.add_block_count(1)
        writer.add_context_length(2048)
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", n)
        writer.add_int32("split.tensors.count", n)
        writer.add_tensor(f"blk.0.ffn_{('gate', 'up', 'down')[number]}_exps.weight", np.zeros((4, 64, 32), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def test_all_parts_of_a_split_model(hub: Any) -> None:
    write_parts(hub.folder)
    with remote.headers_of(hub.model.replace("model.gguf", "split-00001-of-00002.gguf")) as (paths, facts):
        assert len(paths) == 2
        assert [Path(part).name for part in facts.parts] == ["split-00001-of-00002.gguf", "split-00002-of-00002.gguf"]
        assert all(part.startswith(hub.url) for part in facts.parts)
        assert facts.expert_bytes == 2 * 4 * 64 * 32 * 2


def test_a_missing_part(hub: Any) -> None:
    write_parts(hub.folder)
    (hub.folder / "split-00002-of-00002.gguf").unlink()
    text = failure(hub.model.replace("model.gguf", "split-00001-of-00002.gguf"))
    assert "split-00002-of-00002.gguf: does not exist (404)" in text


def test_another_part_than_the_first(hub: Any) -> None:
    write_parts(hub.folder)
    assert "give the first part" in failure(hub.model.replace("model.gguf", "split-00002-of-00002.gguf"))


def test_no_such_file(hub: Any) -> None:
    assert "nothing.gguf: does not exist (404)" in failure(hub.model.replace("model", "nothing"))


@pytest.mark.parametrize(("status", "word"), [(401, "private"), (403, "private"), (500, "answered 500")])
def test_a_server_that_refuses(hub: Any, status: int, word: str) -> None:
    hub.statuses["/owner/repo/resolve/main/model.gguf"] = status
    assert word in failure(hub.model)


def test_a_server_without_ranges(tmp_path: Path, model_path: Path) -> None:
    shutil.copy(model_path, tmp_path / "model.gguf")
    with serve(tmp_path, ranges=False) as server:
        text = failure(f"{server.url}/model.gguf")
    assert text.count("model.gguf") == 1
    assert "does not answer range requests (it said 200)" in text


def test_a_file_that_changes_meanwhile(tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 1 << 12)
    shutil.copy(model_path, tmp_path / "model.gguf")
    with serve(tmp_path, growing=1) as server:
        assert "changed while" in failure(f"{server.url}/model.gguf")


def test_no_server(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        url = f"{server.url}/model.gguf"
    assert "cannot be reached" in failure(url)


def test_what_is_no_model(hub: Any) -> None:
    (hub.folder / "text.gguf").write_bytes(b"<html>not a model, but a page about one</html>")
    assert "text.gguf: is not a GGUF model" in failure(hub.model.replace("model.gguf", "text.gguf"))
    (hub.folder / "empty.gguf").write_bytes(b"")
    assert "empty.gguf" in failure(hub.model.replace("model.gguf", "empty.gguf"))


def test_a_header_that_is_cut_off(hub: Any, model_path: Path) -> None:
    (hub.folder / "short.gguf").write_bytes(model_path.read_bytes()[:5000])
    assert "short.gguf: " in (text := failure(hub.model.replace("model.gguf", "short.gguf")))
    assert "download it again" in text


def test_a_header_without_end(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 1 << 10)
    monkeypatch.setattr(remote, "MAX_HEADER_BYTES", 1 << 12)
    assert "no sound model file" in failure(hub.model)


def test_no_room_for_a_sparse_file(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        assert "set TMPDIR" in failure(hub.model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
