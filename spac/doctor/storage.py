"""The disk that holds a path, the link it hangs on, and where swap lies.

What a link carries is arithmetic: signalling rate times lanes, less the line code, less a tenth for the protocol. What an SSD behind it
reads is not known here; `spac tune` measures that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from spac.doctor.finding import Finding, Level
from spac.host.memory import KIB, format_bytes
from spac.host.system import System, board_model, mount_of, unescape, whole

# GT/s: (generation, bytes a second on a lane after the line code)
_PCIE: Final = {
    2.5: (1, 250e6), 5.0: (2, 500e6), 8.0: (3, 985e6), 16.0: (4, 1969e6), 32.0: (5, 3938e6), 64.0: (6, 7563e6),
}  # fmt: skip
PROTOCOL: Final = 0.9

# Mbit/s of a USB device: bytes a second that disks behind it read at most
_USB: Final = {12: 1e6, 480: 40e6, 5000: 400e6, 10000: 900e6, 20000: 1800e6}

NETWORK: Final = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "virtiofs", "afs")
IN_MEMORY: Final = ("tmpfs", "ramfs", "zram")


@dataclass(frozen=True)
class Link:
    """A PCIe link.

    Attributes:
        generation, lanes: as they were negotiated.
        most_generation, most_lanes: what the device could.
    """

    generation: int
    lanes: int
    bytes_per_s: float
    most_generation: int
    most_lanes: int

    def __str__(self) -> str:
        return f"PCIe {self.generation}.0 x{self.lanes}"


@dataclass(frozen=True)
class Disk:
    """A whole disk.

    Attributes:
        name: in /sys/block.
        path: its folder in /sys/devices.
        kind: "NVMe", "USB", "SD card", "eMMC", "SATA", "virtual", "in memory", "loop" or "disk".
        above: what lies between it and the file system: "encryption", "volume", "RAID"; "" for nothing.
    """

    name: str
    path: str
    kind: str
    rotating: bool
    above: str = ""


def disk_of(path: str, system: System) -> Disk | None:
    """The disk that holds an absolute path; None if it lies on none that the kernel shows."""
    mount = mount_of(path, system)
    if mount is None:
        return None
    place = system.resolve(f"/sys/dev/block/{mount.device}") if re.fullmatch(r"\d+:\d+", mount.device) else None
    return _disk(place, system) if place else disk_of_device(mount.source, system)


def disk_of_device(device: str, system: System) -> Disk | None:
    """The disk of a block device's name, such as /dev/sda1 or /dev/mapper/home."""
    name = device.removeprefix("/dev/")
    if name.startswith("mapper/"):
        dm = [path for path in system.glob("/sys/class/block/*/dm/name") if system.text(path) == name.removeprefix("mapper/")]
        name = dm[0].split("/")[4] if dm else ""
    place = system.resolve(f"/sys/class/block/{name}") if device.startswith("/dev/") and re.fullmatch(r"[\w!-]+", name) else None
    return _disk(place, system) if place else None


def _disk(place: str, system: System, above: str = "", depth: int = 0) -> Disk:
    if system.exists(f"{place}/partition"):
        place = place.rsplit("/", 1)[0]
    below = [found for path in system.glob(f"{place}/slaves/*") if (found := system.resolve(path))]
    if below and depth < 8:
        uuid = system.text(f"{place}/dm/uuid")
        layer = "encryption" if uuid.startswith("CRYPT") else "volume" if uuid else "RAID"
        return _disk(below[0], system, ", ".join(filter(None, (above, layer))), depth + 1)
    name = place.rsplit("/", 1)[1]
    rotating = system.number(f"{place}/queue/rotational") == 1
    return Disk(name, place, _kind(name, place, system), rotating, above)


def _kind(name: str, place: str, system: System) -> str:
    if name.startswith("nvme"):
        return "NVMe"
    if name.startswith("mmcblk"):
        return "eMMC" if system.text(f"{place}/device/type") == "MMC" else "SD card"
    if "/usb" in place:
        return "USB"
    if name.startswith(("zram", "ram")):
        return "in memory"
    if name.startswith("loop"):
        return "loop"
    if name.startswith(("vd", "xvd")) or "/virtio" in place:
        return "virtual"
    return "SATA" if "/ata" in place else "disk"


def link_of(disk: Disk, system: System) -> Link | None:
    """The PCIe link of the device that a disk belongs to."""
    parent = disk.path.rsplit("/", 1)[0]  # of an SSD with more than one path, a folder that links to its controllers
    controllers = [found for path in system.glob(f"{parent}/nvme[0-9]*") if (found := system.resolve(path))]
    for folder in (folder for path in (disk.path, *controllers) for folder in _upwards(path)):
        speed, most_speed = (_pcie(system.text(f"{folder}/{which}_link_speed")) for which in ("current", "max"))
        lanes, most_lanes = (system.number(f"{folder}/{which}_link_width") for which in ("current", "max"))
        if speed is None or lanes is None or not 0 < lanes <= 32:
            continue
        generation, _lane = speed
        return Link(
            generation, lanes, generation_bytes(generation, lanes), most_speed[0] if most_speed else generation, most_lanes or lanes
        )
    return None


def generation_bytes(generation: int, lanes: int) -> float:
    """Bytes a second that such a PCIe link carries."""
    return PROTOCOL * lanes * next(lane for number, lane in _PCIE.values() if number == generation)


def _pcie(text: str) -> tuple[int, float] | None:
    match = re.match(r"(\d{1,2}(?:\.\d)?) GT/s", text)
    return _PCIE.get(float(match[1])) if match else None


def _upwards(path: str) -> Iterator[str]:
    while path.count("/") > 2:
        yield path
        path = path.rsplit("/", 1)[0]


def rate(bytes_per_s: float) -> str:
    """Two significant digits for people: "450 MB/s"."""
    return f"{bytes_per_s / 1e9:.2g} GB/s" if bytes_per_s >= 1e9 else f"{float(f'{bytes_per_s / 1e6:.2g}'):.0f} MB/s"


# -- findings --


def check(path: str, system: System) -> Iterator[Finding]:
    """File system and disk of a path."""
    mount = mount_of(path, system)
    if mount is None:
        yield Finding("storage", "file system", Level.note, "/proc/self/mountinfo does not say what holds this path")
        return
    yield _file_system(mount.kind, mount.source, mount.options)
    disk = disk_of(path, system)
    if disk is None:
        if mount.kind not in (*NETWORK, *IN_MEMORY):
            yield Finding(
                "storage", "disk", Level.note, "the kernel does not show which disk this is (a container?)", "`spac tune` measures it"
            )
        return
    yield _disk_finding(disk, system)
    if disk.above:
        level = Level.note if "encryption" in disk.above else Level.ok
        advice = "decrypting takes processor time that experts' products want, too" if level == Level.note else ""
        yield Finding("storage", "layers", level, f"{disk.above} above {disk.name}", advice)


def _file_system(kind: str, source: str, options: tuple[str, ...]) -> Finding:
    text, level, advice = f"{kind} on {source}", Level.ok, ""
    compressed = next((option for option in options if option.startswith(("compress=", "compress-force=", "compress_algorithm="))), None)
    if kind in NETWORK:
        level, advice = Level.warning, "a network file system: copy the model to a disk of this machine"
    elif kind in IN_MEMORY:
        level, advice = Level.warning, "a file here takes memory itself, so paging saves none: put the model on a disk"
    elif kind == "overlay":
        level, advice = Level.note, "a container's own layer: mount a folder of a disk into it for models"
    elif kind == "btrfs" and compressed and not compressed.endswith(("=no", "=none")):
        level = Level.warning
        advice = f"{compressed}: compressed files are read through the page cache; `chattr +m FOLDER`, then copy the model there anew"
    elif kind in ("vfat", "msdos"):
        level, advice = Level.warning, "no file above 4 GiB, no direct reads on some kernels: use ext4"
    elif kind in ("exfat", "ntfs", "ntfs3", "fuseblk") or kind.startswith("fuse"):
        level, advice = Level.note, "direct reads may be refused or slow here: ext4 or xfs is better"
    return Finding("storage", "file system", level, text, advice, {"kind": kind, "source": source})


def _disk_finding(disk: Disk, system: System) -> Finding:
    facts: dict[str, object] = {"name": disk.name, "kind": disk.kind, "rotating": disk.rotating}
    model = system.text(f"{disk.path}/device/model") or system.text(f"{disk.path}/device/name")
    name = f"{disk.name} {model}".strip()
    if disk.kind == "NVMe":
        return _nvme(name, link_of(disk, system), board_model(system), facts)
    if disk.kind == "USB":
        return _usb(name, disk, system, facts)
    if disk.kind == "SD card":
        advice = "a token of a paged model reads tens to hundreds of megabytes: put the model on an NVMe or USB 3 SSD"
        return Finding("storage", "disk", Level.warning, f"{name}: SD card, 20 to 90 MB/s", advice, facts)
    if disk.rotating and disk.kind != "virtual":
        advice = "an SSD reads experts ten and more times as fast"
        return Finding("storage", "disk", Level.warning, f"{name}: a rotating disk, 100 to 200 MB/s and 10 ms for each read", advice, facts)
    about = {
        "eMMC": "eMMC, 150 to 300 MB/s", "SATA": "SATA SSD, at most 550 MB/s", "virtual": "a virtual disk: what is behind it is not shown",
        "loop": f"a loop device of {system.text(f'{disk.path}/loop/backing_file') or 'a file'}", "in memory": "in memory",
    }.get(disk.kind, "what kind it is, the kernel does not say")  # fmt: skip
    level = Level.ok if disk.kind in ("SATA", "eMMC") else Level.note
    return Finding("storage", "disk", level, f"{name}: {about}", "" if level == Level.ok else "`spac tune` measures it", facts)


def _nvme(name: str, link: Link | None, board: str, facts: dict[str, object]) -> Finding:
    if link is None:
        return Finding("storage", "disk", Level.ok, f"{name}: NVMe, its link is not shown", "", facts)
    facts |= {"pcie_generation": link.generation, "pcie_lanes": link.lanes, "link_bytes_per_s": link.bytes_per_s}
    text, level, advice = f"{name}: NVMe at {link}: about {rate(link.bytes_per_s)}", Level.ok, ""
    pi = re.search(r"Raspberry Pi (5|500|Compute Module 5)", board)
    if pi and link.generation < 3 <= link.most_generation:
        level = Level.warning if link.generation == 1 else Level.note
        advice = (
            f"gen 3 can be forced with dtparam=pciex1_gen=3 in /boot/firmware/config.txt (about {rate(generation_bytes(3, link.lanes))};"
            " the board is certified for gen 2: watch `dmesg` for errors)"
        )
    elif not pi and (link.generation < link.most_generation or link.lanes < link.most_lanes):
        level = Level.note
        advice = (
            f"the SSD could do PCIe {link.most_generation}.0 x{link.most_lanes}: another slot, or without a riser or cable, may be faster"
        )
    return Finding("storage", "disk", level, text, advice, facts)


def _usb(name: str, disk: Disk, system: System, facts: dict[str, object]) -> Finding:
    speed = next((mbit for folder in _upwards(disk.path) if (mbit := system.number(f"{folder}/speed"))), None)
    drivers = [driver.rsplit("/", 1)[1] for folder in _upwards(disk.path) if (driver := system.resolve(f"{folder}/driver"))]
    driver = next((d for d in drivers if d in ("uas", "usb-storage")), "")
    most = _USB.get(speed or 0)
    facts |= {"usb_mbit_per_s": speed, "usb_driver": driver, "link_bytes_per_s": most}
    text = f"{name}: USB" + (f" at {speed} Mbit/s" if speed else "") + (f": at most {rate(most)}" if most else "")
    if disk.rotating:
        text += ", a rotating disk or one that does not say"
    if speed is not None and speed < 5000:
        return Finding("storage", "disk", Level.warning, text, "plug it into a USB 3 (blue) port, with a USB 3 cable", facts)
    if driver == "usb-storage":
        advice = "the adapter works without UASP, one read at a time: one that has it is faster (see usb-storage.quirks= in /proc/cmdline)"
        return Finding("storage", "disk", Level.note, text, advice, facts)
    return Finding("storage", "disk", Level.ok, text, "", facts)


def check_swap(system: System) -> Iterator[Finding]:
    """Where swap lies: proc_swaps(5)."""
    lines = [line.split() for line in system.text("/proc/swaps").splitlines()[1:]]
    areas = [(unescape(f[0]), f[1], (whole(f[2]) or 0) * KIB, (whole(f[3]) or 0) * KIB) for f in lines if len(f) >= 4]
    if not areas:
        yield Finding("memory", "swap", Level.ok, "none")
    compressed = [area for area in areas if area[0].startswith("/dev/zram")]
    if compressed:
        size, used = sum(area[2] for area in compressed), sum(area[3] for area in compressed)
        advice = "weights do not compress, so it holds little of a model: leave --memory below what is available"
        yield Finding("memory", "zram", Level.note, _amount("compressed memory", size, used), advice, {"bytes": size, "used_bytes": used})
    for name, kind, size, used in areas:
        if name.startswith("/dev/zram"):
            continue
        disk = disk_of_device(name, system) if kind == "partition" else disk_of(name, system)
        facts = {"path": name, "bytes": size, "used_bytes": used, "disk": disk.kind if disk else None}
        if disk is not None and disk.kind in ("SD card", "eMMC"):
            advice = (
                "a board that swaps to it stalls for seconds, and wears it: `sudo systemctl disable --now dphys-swapfile` (Debian 12),"
                " Mechanism=zram in /etc/rpi/swap.conf (Debian 13), or `sudo swapoff -a` and the line in /etc/fstab"
            )
            yield Finding("memory", "swap", Level.warning, _amount(f"{name} on an {disk.kind}", size, used), advice, facts)
        else:
            where = f"{name} on {disk.name} ({disk.kind})" if disk else name
            yield Finding("memory", "swap", Level.ok, _amount(where, size, used), "", facts)


def _amount(what: str, size: int, used: int) -> str:
    return f"{what}, {format_bytes(size)}, {format_bytes(used)} used"
