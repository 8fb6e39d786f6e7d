"""`spac plan` and `spac tune`, and `spac inspect` of a remote model: what they print, and one line for what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spac import device
from tests.conftest import Result
from tests.devices import make_device
from tests.ranges import serve

Cli = Callable[..., Result]
KEYS = ["fits", "decode_tokens_per_s", "decode_interval", "prefill_tokens_per_s", "ttft_s", "budget", "curve"]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on measuring: the probe finds a made-up device."""
    monkeypatch.setattr(device, "probe", lambda *_, **__: make_device(quick=True))


def limit_of(cli: Cli, model: Path, spare_bytes: int) -> int:
    """A limit that leaves so much to the experts, whatever this test process holds already."""
    budget = json.loads(cli("plan", model, "--memory", "8G", "--json").out)["budget"]
    fixed = sum(budget[key] for key in ("dense_bytes", "context_bytes", "compute_bytes", "vocabulary_bytes", "process_bytes"))
    return int((fixed + spare_bytes + (14 << 20)) * 1.004)


@pytest.mark.usefixtures("measured")
def test_one_object_with_exactly_these_keys(cli: Cli, model_path: Path) -> None:
    limit = limit_of(cli, model_path, 8 << 20)
    result = cli("plan", model_path, "--memory", limit, "--ubatch", "512", "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert list(found) == KEYS
    assert found["fits"] is True
    assert found["budget"]["paged"] is True
    low, high = found["decode_interval"]
    assert 0 < low < found["decode_tokens_per_s"] < high
    budget = found["budget"]
    parts = ("dense", "context", "compute", "vocabulary", "process", "reserve", "expert")
    assert sum(budget[f"{part}_bytes"] for part in parts) <= budget["limit_bytes"] == limit
    assert 0 < budget["expert_bytes"] < budget["all_expert_bytes"]
    assert len(found["curve"]) > 5
    assert {"memory_bytes", "decode_tokens_per_s", "decode_interval", "faster_disk_tokens_per_s"} == set(found["curve"][0])


@pytest.mark.usefixtures("measured")
def test_another_device_by_what_tune_kept_there(cli: Cli, model_path: Path, tmp_path: Path) -> None:
    """A slower disk is a slower plan."""
    speeds, limit = [], limit_of(cli, model_path, 8 << 20)
    for name, rate in (("fast", 2e9), ("slow", 1e8)):
        kept = tmp_path / f"{name}.json"
        reads = tuple(dataclasses.replace(row, seconds=row.size_bytes * row.depth / rate) for row in make_device().reads)
        device.save(make_device(reads=reads), kept)
        speeds.append(
            json.loads(cli("plan", model_path, "--memory", limit, "--ubatch", "512", "--device", kept, "--json").out)["decode_tokens_per_s"]
        )
    assert speeds[0] > 2 * speeds[1]
    assert "give --memory in bytes" in cli("plan", model_path, "--device", kept).line
    assert "give --memory in bytes" in cli("plan", model_path, "--memory", "50%", "--device", kept).line
    assert "cannot read the device: No such file" in cli("plan", model_path, "--memory", "1G", "--device", "none.json").line
    kept.write_text("{}")
    assert "not what spac tune keeps" in cli("plan", model_path, "--memory", "1G", "--device", kept).line


@pytest.mark.usefixtures("measured")
def test_a_model_that_does_not_fit(cli: Cli, model_path: Path) -> None:
    result = cli("plan", model_path, "--memory", "20M", "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert list(found) == KEYS
    assert found["fits"] is False
    assert found["decode_tokens_per_s"] is found["decode_interval"] is found["ttft_s"] is None
    assert found["curve"]
    assert "no: needs at least" in cli("plan", model_path, "--memory", "20M").out


@pytest.mark.usefixtures("measured")
def test_tables_for_people(cli: Cli, model_path: Path) -> None:
    out = cli("plan", model_path, "--memory", limit_of(cli, model_path, 8 << 20), "--ubatch", "512").out
    for words in (
        "of the experts in memory",
        "tokens/s (",
        "first token after",
        "dense weights",
        "Python and libraries",
        "← this memory",
        "Q8_0",
        "← pick",
    ):
        assert words in out
    assert "yes, whole" in cli("plan", model_path, "--memory", "8G").out


@pytest.mark.usefixtures("measured")
def test_a_dense_model(cli: Cli, dense_path: Path) -> None:
    assert "a dense model" in cli("plan", dense_path, "--memory", "8G").out
    assert "no: needs at least" in cli("plan", dense_path, "--memory", "20M").out
    assert json.loads(cli("plan", dense_path, "--memory", "8G", "--json").out)["fits"]


@pytest.mark.usefixtures("measured")
def test_a_device_limits_reads_cores_and_memory(cli: Cli, model_path: Path) -> None:
    free, sd = (json.loads(cli("plan", model_path, *arguments, "--json").out) for arguments in ((), ("--device", "pi5-sd")))
    assert sd["budget"]["limit_bytes"] == 7 << 30
    assert sd["decode_tokens_per_s"] < free["decode_tokens_per_s"]
    half = json.loads(cli("plan", model_path, "--device", "pi5-sd", "--memory", "50%", "--json").out)
    assert half["budget"]["limit_bytes"] == 7 << 29  # of the device's
    out = cli("plan", model_path, "--device", "pi5-sd").out
    assert "reads limited to 90 MB/s" in out


@pytest.mark.usefixtures("measured")
def test_a_remote_model_is_planned_as_a_local_one(cli: Cli, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = json.loads(cli("plan", model_path, "--memory", "8G", "--json").out)
    with serve(model_path.parent) as server:
        url = f"{server.url}/{model_path.name}"
        result = cli("plan", url, "--memory", "8G", "--json")
        assert (result.code, result.err) == (0, "")
        remote = json.loads(result.out)
        for found in (local, remote):
            del found["budget"]["process_bytes"], found["curve"]
        assert remote == local
        assert url in cli("plan", url, "--memory", "8G").out
        shown = json.loads(cli("inspect", url, "--json").out)
    assert shown["path"] == url
    assert shown["experts"] == 32


def test_what_cannot_be_planned(cli: Cli, model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model, but a text about one")
    assert "is not a GGUF model" in cli("plan", tmp_path / "text.gguf").line
    assert "nowhere.gguf" in cli("plan", tmp_path / "nowhere.gguf").line
    assert "--device: profile 'toaster' does not exist" in cli("plan", model_path, "--device", "toaster").line
    assert "is not a size" in cli("plan", model_path, "--memory", "much").line
    with serve(tmp_path) as server:
        assert "does not exist (404)" in cli("plan", f"{server.url}/x.gguf").line
        assert "does not exist (404)" in cli("inspect", f"{server.url}/x.gguf").line
    with serve(model_path.parent, ranges=False) as server:
        assert "does not answer range requests" in cli("plan", f"{server.url}/{model_path.name}").line


def test_a_kept_profile_is_used_and_an_unusable_one_named(
    cli: Cli, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = device.path_of(model_path)
    mine = make_device(build=device.identity(model_path)["build"])
    device.save(mine, kept)
    monkeypatch.setattr(device, "probe", lambda *_, **__: pytest.fail("measured again"))
    result = cli("plan", model_path, "--memory", "8G")
    assert "made up" in result.out
    assert "measured 2026-01-01 00:00:00, speed now" in result.out
    assert result.err == ""
    hollow = tmp_path / "header.gguf"
    hollow.write_bytes(model_path.read_bytes()[: 4 << 20])
    os.truncate(hollow, model_path.stat().st_size)
    device.save(mine, device.path_of(hollow))
    assert "speed now" not in cli("plan", hollow, "--memory", "8G").out
    monkeypatch.setattr(device, "probe", lambda *_, **__: make_device(cpu="probed", quick=True))
    kept.write_text("{")
    result = cli("plan", model_path, "--memory", "8G")
    assert "probed" in result.out
    assert result.err.count("\n") == 1
    assert "damaged; measured again in short" in result.err


@pytest.mark.usefixtures("measured")
def test_a_probe_where_the_working_directory_cannot_be_written(cli: Cli, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Path] = []

    def probe(place: Path, **_: object) -> device.Device:
        places.append(place)
        if len(places) == 1:
            raise device.SpacError("not here")
        return make_device()

    monkeypatch.setattr(device, "probe", probe)
    with serve(model_path.parent) as server:
        assert cli("plan", f"{server.url}/{model_path.name}", "--memory", "8G", "--json").code == 0
    assert places[1].name == "spac"


# -- tune --


def test_what_is_measured_is_kept_and_shown(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = device.identity(tmp_path)["build"]
    monkeypatch.setattr(device, "measure", lambda *_, **__: make_device(build=build))
    assert "nothing was measured" in cli("tune", tmp_path, "--show").line
    result = cli("tune", tmp_path)
    assert (result.code, result.err) == (0, "")
    for words in ("made up", "reads, direct: MB/s", "6 reads at once", "█", "Q4_0", "10", "µs"):
        assert words in result.out
    monkeypatch.setattr(device, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert cli("tune", tmp_path, "--show").out == result.out
    assert json.loads(cli("tune", tmp_path, "--show", "--json").out)["cpu"] == "made up"


@pytest.mark.parametrize(("content", "reason"), [("{", "damaged"), (None, "another build of spac")])
def test_an_unusable_profile_is_measured_again(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, reason: str
) -> None:
    kept = device.path_of(tmp_path)
    device.save(make_device(), kept)
    if content is not None:
        kept.write_text(content)
    build = device.identity(tmp_path)["build"]
    monkeypatch.setattr(device, "measure", lambda *_, **__: make_device(build=build))
    result = cli("tune", tmp_path, "--show")
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert f"{reason}; measuring again" in result.err
    assert cli("tune", tmp_path, "--show").err == ""


def test_a_cache_that_cannot_be_written(cli: Cli, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_folder.write_text("a file")
    monkeypatch.setattr(device, "measure", lambda *_, **__: pytest.fail("measured in vain"))
    assert "set XDG_CACHE_HOME" in cli("tune", tmp_path).line


def test_where_nothing_can_be_tuned(cli: Cli, tmp_path: Path) -> None:
    assert "no such file or folder" in cli("tune", tmp_path / "nowhere").line


def test_a_plot_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    device.save(make_device(build=device.identity(tmp_path)["build"]), device.path_of(tmp_path))
    result = cli("tune", tmp_path, "--show", "--plot", tmp_path / "nowhere/plot.png")
    assert result.code == 1
    assert "cannot be written" in result.err or "needs matplotlib" in result.err
    assert not os.path.exists(tmp_path / "nowhere")  # noqa: PTH110
