"""`spac doctor` on recorded trees of four machines (trees/README.md), on damaged ones, and here."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import spac
from spac.cli.doctor import show
from spac.doctor import Level, Place, examine, model_file, process, storage
from spac.host import system as systems
from spac.host.system import System, mount_of
from spac.stats import StoresProbe
from tests.conftest import Result
from tests.doctor.conftest import NAMES, look, read_tree, write_entry

Tree = Callable[[str], System]
Cli = Callable[..., Result]

PLACES = {"pi4": "/mnt/ssd/m.gguf", "pi5": "/home/pi/m.gguf", "orin-nano": "/home/u/m.gguf", "pc": "/home/me/m.gguf"}


def test_every_tree_has_a_place() -> None:
    assert sorted(PLACES) == NAMES


def test_raspberry_pi_4(tree: Tree) -> None:
    """Hot, underfed, swapping to its card; the model lies well, on a USB 3 SSD with UASP."""
    found = look(tree("pi4"), PLACES["pi4"])
    assert found["board"][0].text == "Raspberry Pi 4 Model B Rev 1.4"
    assert found["processor"][0].facts == {"model": "Cortex-A72", "processors": 4, "features": ["neon"]}
    assert found["processor"][0].level == Level.note
    assert found["pages"][0].facts["page_bytes"] == 4096
    assert found["voltage"][0].facts == {"bits": 0x50005, "now": ["under-voltage", "throttled"], "since_start": []}
    assert "power supply" in found["voltage"][0].advice
    assert found["temperature"][0].level == Level.warning
    assert [(f.level, f.facts["disk"]) for f in found["swap"]] == [(Level.warning, "SD card")]
    disk = found["disk"][0]
    assert (disk.level, disk.facts["usb_mbit_per_s"], disk.facts["usb_driver"], disk.facts["link_bytes_per_s"]) == (Level.ok, 5000, "uas", 400e6)
    assert "cgroup_enable=memory" in found["control groups"][0].advice
    assert "psi=1" in found["pressure"][0].advice


def test_a_model_on_the_card(tree: Tree) -> None:
    disk = look(tree("pi4"), "/home/pi/m.gguf")["disk"][0]
    assert (disk.level, disk.facts["kind"]) == (Level.warning, "SD card")
    assert "SSD" in disk.advice


def test_raspberry_pi_5(tree: Tree) -> None:
    """16 KiB pages; NVMe at half the speed that it could be forced to."""
    found = look(tree("pi5"), PLACES["pi5"])
    assert found["pages"][0].facts["page_bytes"] == 16384
    assert found["processor"][0].facts["features"] == ["neon", "dotprod", "fp16"]
    disk = found["disk"][0]
    assert "NVMe at PCIe 2.0 x1: about 450 MB/s" in disk.text
    assert "dtparam=pciex1_gen=3" in disk.advice
    assert "890 MB/s" in disk.advice
    assert found["voltage"][0].level == Level.ok
    assert found["zram"][0].level == Level.note
    assert "swap" not in found
    assert not [f for findings in found.values() for f in findings if f.level == Level.warning]


def test_jetson_orin_nano(tree: Tree) -> None:
    found = look(tree("orin-nano"), PLACES["orin-nano"])
    mode = found["power mode"][0]
    assert mode.facts == {"mode": 3, "name": "7W", "modes": {0: "15W", 1: "25W", 2: "MAXN_SUPER", 3: "7W"}}
    assert "nvpmodel -m 2" in mode.advice
    assert found["cores"][0].facts == {"offline": "4-5"}
    assert found["clock"][0].facts["allowed_khz"] == 1_113_600
    assert found["throttling"][0].level == Level.warning
    assert found["disk"][0].facts["link_bytes_per_s"] == pytest.approx(3.546e9)
    assert found["zram"][0].facts["bytes"] == 2 * 650_244 * 1024
    assert found["memory"][0].level == Level.note
    assert "voltage" not in found


def test_a_pc(tree: Tree) -> None:
    """A laptop on battery, in a control group, with limits that no model fits into."""
    system = tree("pc")
    found = look(system, PLACES["pc"])
    assert found["board"][0].text == "LENOVO 20XW00ABCD"
    assert found["processor"][0].level == Level.ok
    assert "cores" not in found  # those that could be plugged in
    assert "governor" not in found  # intel_pstate
    assert found["power"][0].text == "on battery"
    assert found["control groups"][0].facts == {"version": 2, "limit_bytes": 4 << 30, "used_bytes": 1 << 29}
    assert found["processor quota"][0].facts["cores"] == 1.5
    assert found["overcommit"][0].level == Level.warning
    assert found["address space"][0].facts == {"bytes": 8 << 30}
    assert found["open files"][0].facts == {"n": 128}
    assert found["huge pages"][0].level == Level.note
    disk = found["disk"][0]
    assert (disk.facts["name"], disk.facts["pcie_generation"], disk.facts["pcie_lanes"]) == ("nvme0n1", 3, 4)
    assert "PCIe 4.0 x4" in disk.advice
    assert found["layers"][0].text == "encryption above nvme0n1"
    assert found["swap"][0].facts["disk"] == "NVMe"  # a volume in the encrypted disk


@pytest.mark.parametrize(
    ("path", "name", "words"),
    [
        ("/data/m", "disk", "rotating"),
        ("/home/me/zip/m", "file system", "compress=zstd:3"),
        ("/home/me/zip/m", "layers", "volume above sda"),
        ("/mnt/nas/m", "file system", "network"),
        ("/tmp/m", "file system", "takes memory itself"),
    ],
)
def test_other_places_of_the_pc(tree: Tree, path: str, name: str, words: str) -> None:
    finding = look(tree("pc"), path)[name][0]
    assert words in finding.text + finding.advice


def change(system: System, **values: str) -> System:
    """Files of a tree, found by the end of their path, with other contents."""
    for end, text in values.items():
        (path,) = [p for p in system.root.rglob(end) if p.is_file() and "nvme0n1" not in p.parts[-2:]][:1]
        path.write_text(text)
    return system


@pytest.mark.parametrize(
    ("name", "values", "finding", "level", "words"),
    [
        ("pi5", {"current_link_speed": "8.0 GT/s PCIe"}, "disk", Level.ok, "PCIe 3.0 x1: about 890 MB/s"),
        ("pi5", {"current_link_speed": "2.5 GT/s PCIe"}, "disk", Level.warning, "PCIe 1.0 x1: about 220 MB/s"),
        ("pi5", {"vcgencmd get_throttled": "throttled=0x80000"}, "voltage", Level.note, "soft temperature limit"),
        ("pi5", {"vcgencmd get_throttled": "throttled=0x10000"}, "voltage", Level.warning, "since the start: under-voltage"),
        ("pi5", {"scaling_governor": "powersave"}, "governor", Level.warning, "powersave"),
        ("orin-nano", {"status": "pmode:0002 fmode:quiet"}, "power mode", Level.ok, "mode 2 (MAXN_SUPER)"),
        ("orin-nano", {"status": "pmode:0009"}, "power mode", Level.ok, "not named"),
        ("orin-nano", {"status": ""}, "power mode", Level.note, "not known"),
        ("pc", {"cpuinfo": "processor : 0\nflags : sse2 avx\n"}, "processor", Level.warning, "AVX2"),
    ],
)  # fmt: skip
def test_other_values(tree: Tree, name: str, values: dict[str, str], finding: str, level: Level, words: str) -> None:
    found = look(change(tree(name), **values), PLACES[name])[finding][0]
    assert found.level == level
    assert words in found.text + found.advice


@pytest.mark.parametrize(("text", "driver", "level", "words"), [("480", "uas", Level.warning, "USB 3 (blue)"), ("5000", "usb-storage", Level.note, "UASP")])
def test_usb(tree: Tree, text: str, driver: str, level: Level, words: str) -> None:
    system = tree("pi4")
    (device,) = system.root.glob("sys/devices/**/2-1")
    (device / "speed").write_text(text)
    (system.root / "sys/bus/usb/drivers/uas").rename(system.root / "sys/bus/usb/drivers" / ("moved" if driver == "uas" else driver))
    link = device / "2-1:1.0" / "driver"
    link.unlink()
    link.symlink_to(system.root / "sys/bus/usb/drivers" / ("moved" if driver == "uas" else driver))
    found = look(system, PLACES["pi4"])["disk"][0]
    assert (found.level, words in found.advice) == (level, True)


def test_voltage_without_the_command(tree: Tree) -> None:
    """By the firmware's file, then by the voltage sensor alone."""
    system = tree("pi4")
    (system.root / "commands/vcgencmd get_throttled").unlink()
    assert look(system, "/")["voltage"][0].facts["bits"] == 0x50005
    (system.root / "sys/devices/platform/soc/soc:firmware/get_throttled").unlink()
    assert look(system, "/")["voltage"][0].facts["since_start"] == ["under-voltage"]


def test_power_mode_by_the_command(tree: Tree) -> None:
    system = tree("orin-nano")
    (system.root / "var/lib/nvpmodel/status").unlink()
    write_entry(system.root, "/commands/nvpmodel -q", ":", "NV Power Mode: 25W\n1\n")
    assert look(system, "/")["power mode"][0].facts["name"] == "25W"


def test_an_ssd_with_two_paths(tree: Tree) -> None:
    """Its block device is then below a virtual subsystem that links to the controllers."""
    system = tree("pc")
    write_entry(system.root, "/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme9n1/queue/rotational", ":", "0\n")
    write_entry(system.root, "/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0", "->", "../../../pci0000:00/0000:00:1d.0/0000:03:00.0/nvme/nvme0")
    write_entry(system.root, "/sys/class/block/nvme9n1", "->", "../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme9n1")
    disk = storage.disk_of_device("/dev/nvme9n1", system)
    assert disk is not None
    assert str(storage.link_of(disk, system)) == "PCIe 3.0 x4"


# -- whatever is missing or damaged --


@pytest.mark.parametrize("name", NAMES)
def test_each_entry_missing_or_damaged(tree: Tree, name: str) -> None:
    """One at a time: gone, empty, bytes, a folder, a link that goes round, numbers that are none. There is always a report, of strings."""
    system = tree(name)
    entries = read_tree(name)
    rng = random.Random(name)
    before = (system.root / "proc/self/mountinfo").read_bytes()
    n = 0
    for path, (kind, text) in entries.items():
        place = system.root / path.lstrip("/")
        original = text if kind == "->" else ""
        damages: list[Callable[[Path], object]] = [
            lambda _: None,
            lambda p: p.write_bytes(b""),
            lambda p: p.write_bytes(rng.randbytes(300)),
            lambda p: p.write_bytes(b"\0\xff" * 2000),
            lambda p: p.write_text("-1 99999999999999999999999 nan 0x\n" * 3),
            lambda p, t=text: p.write_text("".join(c if rng.random() > 0.1 else chr(rng.randrange(1, 300)) for c in t)),  # type: ignore[misc]
            lambda p, t=text: p.write_text("\n".join(rng.sample(t.split("\n"), len(t.split("\n")))[: 1 + len(t) // 40])),  # type: ignore[misc]
            lambda p: p.mkdir(),
            lambda p: p.symlink_to(p.name),
        ]
        for damage in damages:
            place.unlink()
            damage(place)
            for findings in look(system, PLACES[name]).values():
                assert all(isinstance(f.text, str) and f.text and json.dumps(f.facts) for f in findings)
            n += 1
            place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink(missing_ok=True)
            write_entry(system.root, path, kind, original or text)
    assert n == 9 * len(entries)
    assert (system.root / "proc/self/mountinfo").read_bytes() == before


def test_an_empty_root(tmp_path: Path) -> None:
    found = look(System(tmp_path), "/home")
    assert all(f.level != Level.warning for findings in found.values() for f in findings)
    assert found["board"][0].text == "not named by device tree or firmware"
    assert found["memory"][0].level == Level.note


@pytest.mark.parametrize(
    ("line", "device"),
    [("1 2 8:1 / / rw - ext4 /dev/sda1 rw", "8:1"), ("1 2 x / / rw - ext4 /dev/sda1 rw", "x"), ("1 2 8:1 / /a\\040b rw - ext4 s rw", None), ("- - -", None), ("", None)],
)  # fmt: skip
def test_mounts(tmp_path: Path, line: str, device: str | None) -> None:
    write_entry(tmp_path, "/proc/self/mountinfo", ":", line)
    mount = mount_of("/a", System(tmp_path))
    assert (mount.device if mount else None) == device
    assert storage.disk_of("/a", System(tmp_path)) is None


def test_the_mount_nearest_to_the_path(tree: Tree) -> None:
    """Not one whose name merely begins alike; of two at one place, the later."""
    system = tree("pc")
    with (system.root / "proc/self/mountinfo").open("a") as file:
        file.write("70 28 8:9 / /dat rw - xfs /dev/sdz1 rw\n71 60 8:8 / /data rw - xfs /dev/sdy1 rw\n72 28 8:7 / /a\\040b rw - xfs /dev/sdx1 rw\n")
    assert [m.device for path in ("/data/m", "/dat", "/datx", "/a b/c", "/ab") if (m := mount_of(path, system))] == ["8:8", "8:9", "254:0", "8:7", "254:0"]


def test_links_out_of_the_root_lead_nowhere(tmp_path: Path) -> None:
    write_entry(tmp_path, "/sys/out", "->", "/etc")
    assert System(tmp_path).resolve("/sys/out") is None
    assert System(tmp_path).text("/nowhere") == ""


def test_commands_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert System().command("spac-no-such-program") == ""
    assert System().command("false") == ""
    assert System().command("echo", "a", "b") == "a b"
    monkeypatch.setattr(systems.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError("no memory")))
    assert System().command("echo", "a") == ""


# -- a model, and the command --


def test_this_machine_without_a_model(cli: Cli, tmp_path: Path) -> None:
    result = cli("doctor", tmp_path)
    assert (result.code, result.err) == (0, "")
    for topic in ("board", "kernel", "memory", "storage", "process", "software"):
        assert topic in result.out.splitlines()
    assert f"spac {spac.__version__}" in result.out
    assert result.out.splitlines()[-1].endswith("notes")


def test_a_model_here(cli: Cli, model_path: Path) -> None:
    result = cli("doctor", "--json", model_path)
    assert result.code == 0
    found = {f["name"]: f for f in json.loads(result.out)["findings"]}
    assert found["experts"]["facts"]["floor_bytes"] > 0
    assert found["pages"]["facts"]["page_bytes"] == os.sysconf("SC_PAGE_SIZE")
    assert set(found["direct reads"]["facts"]) == {"direct_align", "errno"}
    assert set(found["fragments"]) == {"topic", "name", "level", "text", "advice", "facts"}


@pytest.mark.parametrize("path", ["/nowhere/model.gguf", "x" * 300, "/dev/null/m"])
def test_a_model_that_is_not_there(cli: Cli, path: str) -> None:
    assert "give a model, or the folder" in cli("doctor", path).line


def test_names_of_devices_do_not_steer_the_terminal(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    system = tree("pi5")
    write_entry(system.root, "/proc/device-tree/name", ":", "")
    (system.root / "proc/device-tree/model").write_bytes(b"Pi\x1b[2J\x07\n[red]x\xff")
    show(examine(system, Place("/")))
    out = capsys.readouterr().out
    assert "Pi?[2J??[red]x" in out
    assert "\x1b" not in out


def test_a_pipe_is_no_model(cli: Cli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in cli("doctor", tmp_path / "pipe").line


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 100])
def test_a_damaged_model_is_a_finding(cli: Cli, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    result = cli("doctor", path, "--json")
    assert result.code == 0
    (headers,) = [f for f in json.loads(result.out)["findings"] if f["name"] == "headers"]
    assert headers["level"] == "warning"
    assert "m.gguf" in headers["text"]
    assert "libspac" not in result.out


def test_an_unfinished_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    texts = [f.text for f in model_file.check(path, None)]
    assert any("only 0 B of 1 MiB are on the disk" in text for text in texts)


def fiemap(pieces: list[tuple[int, int, int, int]]) -> Callable[[int, int, bytearray], None]:
    """An ioctl that tells of these pieces (logical, physical, length, flags), at most two in a call."""

    def ioctl(_: int, number: int, buffer: bytearray) -> None:
        assert number == 0xC020660B
        start = int.from_bytes(buffer[:8], "little")
        left = [piece for piece in pieces if piece[0] >= start][:2]
        buffer[20:24] = len(left).to_bytes(4, "little")
        for i, (logical, physical, length, flags) in enumerate(left):
            model_file._EXTENT.pack_into(buffer, 32 + i * 56, logical, physical, length, 0, 0, flags, 0, 0, 0)

    return ioctl


MIB = 1 << 20


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([(0, 0, 100 * MIB, 1)], (1, False)),
        ([(0, 5 * MIB, MIB, 0), (MIB, 6 * MIB, MIB, 0), (2 * MIB, 7 * MIB, MIB, 1)], (1, False)),  # lie together
        ([(i * MIB, 3 * i * MIB, MIB, i == 4) for i in range(5)], (5, False)),
        ([(0, 0, MIB, 8), (MIB, MIB, MIB, 9)], (2, True)),
        ([], (0, False)),
    ],
)  # fmt: skip
def test_pieces_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[tuple[int, int, int, int]], expected: tuple[int, bool]
) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"x")
    monkeypatch.setattr(model_file.fcntl, "ioctl", fiemap(pieces))
    assert model_file.extents_of(path) == model_file.Extents(*expected)


@pytest.mark.parametrize(("n", "level"), [(1, Level.ok), (2, Level.ok), (64, Level.note), (1024, Level.warning)])
def test_fragments(dense_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, level: Level) -> None:
    """Of the dense model: some 6 MB, in n pieces."""
    monkeypatch.setattr(model_file, "extents_of", lambda _: model_file.Extents(n, False))
    monkeypatch.setattr(model_file, "SHORT_BYTES", dense_path.stat().st_size // 3)
    monkeypatch.setattr(model_file, "TINY_BYTES", dense_path.stat().st_size // 500)
    (finding,) = [f for f in model_file.check(dense_path, None) if f.name == "fragments"]
    assert (finding.level, finding.facts["extents"]) == (level, n)


def test_a_real_file_has_pieces_or_the_file_system_does_not_tell(model_path: Path) -> None:
    extents = model_file.extents_of(model_path)
    assert extents is None or extents.n > 0


def test_direct_reads_refused(model_path: Path) -> None:
    (finding,) = [f for f in model_file.check(model_path, StoresProbe(4096, 0, 22, False)) if f.name == "direct reads"]
    assert (finding.level, finding.facts) == (Level.note, {"direct_align": 0, "errno": 22})
    assert "EINVAL" in finding.text


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spac, "library_folder", None)
    found = examine(System(), Place("/"))
    assert [f.name for f in found if f.level == Level.warning and "make build" in f.advice] == ["libspac"]


def test_another_llama_cpp_python(monkeypatch: pytest.MonkeyPatch) -> None:
    known = process.importlib.metadata.version
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: "0.1.2" if name == "llama-cpp-python" else known(name))
    (finding,) = [f for f in process.check_versions() if f.level == Level.warning]
    assert "0.1.2" in finding.text
    assert "pip install llama-cpp-python==" in finding.advice
