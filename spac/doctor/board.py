"""Board and processor: what they are, whether they are slowed down now, and whether they need be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from spac.doctor.finding import Finding, Level
from spac.host import board
from spac.host.system import System, board_model, cpu_model, whole

# bits of the firmware's get_throttled; shifted by 16: has happened since the start
_THROTTLED: Final = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}

WARM_C, HOT_C = 70, 80  # a Raspberry Pi's firmware slows down from 80 °C (Pi 3 B+: 60), others from 85 or so

# what quantised products are fast with, as /proc/cpuinfo has it: name, and what it is called there
_FEATURES: Final = {
    "neon": "asimd", "dotprod": "asimddp", "fp16": "asimdhp", "i8mm": "i8mm", "sve": "sve", "avx2": "avx2", "f16c": "f16c",
    "avx512": "avx512f", "avx512-vnni": "avx512_vnni", "avx-vnni": "avx_vnni",
}  # fmt: skip


def check(system: System) -> Iterator[Finding]:
    """Board, processor, temperature, voltage, power mode."""
    name = board_model(system)
    yield Finding("board", "board", Level.ok, name or "not named by device tree or firmware", "", {"model": name})
    yield _processor(system)
    yield from _cores(system)
    yield from _clock(system)
    yield from _temperature(system)
    yield from _voltage(system)
    yield from _jetson(system, name)
    online = [system.number(path) for path in system.glob("/sys/class/power_supply/*/online")]
    if online and system.glob("/sys/class/power_supply/BAT*") and not any(online):
        yield Finding("board", "power", Level.note, "on battery", "many laptops slow down: plug it in")


def _processor(system: System) -> Finding:
    info = system.text("/proc/cpuinfo")
    flags = set(re.findall(r"[\w]+", " ".join(re.findall(r"^(?:Features|flags)\s*:(.*)$", info, re.MULTILINE))))
    features = [name for name, flag in _FEATURES.items() if flag in flags]
    cores = len(re.findall(r"^processor\s*:", info, re.MULTILINE))
    facts = {"model": cpu_model(system), "processors": cores, "features": features}
    text = f"{facts['model'] or 'not named'}, {cores} processors, {', '.join(features) or 'no vector extensions known here'}"
    if "asimd" in flags and "asimddp" not in flags:
        return Finding("board", "processor", Level.note, text, "without dotprod (Armv8.2) products take about twice the time", facts)
    if "sse2" in flags and "avx2" not in flags:
        return Finding("board", "processor", Level.warning, text, "without AVX2 products take several times as long", facts)
    return Finding("board", "processor", Level.ok, text, "", facts)


def _cores(system: System) -> Iterator[Finding]:
    off = system.text("/sys/devices/system/cpu/offline")
    if (
        re.fullmatch(r"[0-9,-]+", off)
        and re.search(r"\d", off)
        and not _beyond_present(off, system.text("/sys/devices/system/cpu/present"))
    ):
        advice = "a Jetson's power mode switches them off; else `echo 1 | sudo tee /sys/devices/system/cpu/cpuN/online`"
        yield Finding("board", "cores", Level.warning, f"processors {off} are off", advice, {"offline": off})


def _beyond_present(off: str, present: str) -> bool:
    """A PC's kernel lists processors that could be plugged in as offline."""
    last, first = whole(present.rsplit("-", 1)[-1]), whole(re.split("[,-]", off)[0])
    return last is not None and first is not None and first > last


def _clock(system: System) -> Iterator[Finding]:
    folders = system.glob("/sys/devices/system/cpu/cpufreq/policy*") or system.glob("/sys/devices/system/cpu/cpu0/cpufreq")
    for folder in folders:
        allowed, most = system.number(f"{folder}/scaling_max_freq"), system.number(f"{folder}/cpuinfo_max_freq")
        governor, driver = system.text(f"{folder}/scaling_governor"), system.text(f"{folder}/scaling_driver")
        name = folder.rsplit("/", 1)[1]
        facts = {"policy": name, "governor": governor, "allowed_khz": allowed, "most_khz": most}
        if allowed and most and allowed < most:
            text = f"{name}: clock capped at {allowed / 1000:.0f} of {most / 1000:.0f} MHz"
            yield Finding("board", "clock", Level.note, text, "by a power mode, or somebody's setting of scaling_max_freq", facts)
        # with pstate drivers "powersave" is the ordinary, dynamic governor
        if governor == "powersave" and "pstate" not in driver:
            advice = "`echo ondemand | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor`"
            yield Finding("board", "governor", Level.warning, f"{name}: governor powersave, always the lowest clock", advice, facts)


def _temperature(system: System) -> Iterator[Finding]:
    found = board.temperature_c(system.root)
    if found is not None and -50 < found < 200:
        level = Level.warning if found >= HOT_C else Level.note if found >= WARM_C else Level.ok
        advice = "" if level == Level.ok else "generating keeps all cores busy for minutes: a heat sink and a fan"
        yield Finding("board", "temperature", level, f"{found:.0f} °C, hottest zone", advice, {"celsius": found})
    for folder in system.glob("/sys/class/thermal/cooling_device*"):
        kind, state = system.text(f"{folder}/type"), system.number(f"{folder}/cur_state")
        if re.match(r"(thermal-)?cpufreq|Processor|cpu", kind) and state:
            yield Finding(
                "board", "throttling", Level.warning, f"{kind} is slowed down by heat now (state {state})", "cool it", {"state": state}
            )


def _voltage(system: System) -> Iterator[Finding]:
    """Raspberry Pi: the firmware's bits by vcgencmd, or by sysfs; else the voltage alarm alone."""
    bits = None
    if match := re.search(r"throttled=0x([0-9a-fA-F]{1,8})\b", system.command("vcgencmd", "get_throttled")):
        bits = int(match[1], 16)
    else:
        for path in system.glob("/sys/devices/platform/soc*/soc*:firmware/get_throttled"):
            text = system.text(path).removeprefix("0x")
            bits = int(text, 16) if re.fullmatch(r"[0-9a-fA-F]{1,8}", text) else bits
    sensors = [folder for folder in system.glob("/sys/class/hwmon/hwmon*") if system.text(f"{folder}/name") == "rpi_volt"]
    if bits is None and sensors:
        bits = 1 << 16 if any(system.number(f"{folder}/in0_lcrit_alarm") for folder in sensors) else 0
    if bits is None:
        return
    now = [words for bit, words in _THROTTLED.items() if bits >> bit & 1]
    before = [words for bit, words in _THROTTLED.items() if bits >> (bit + 16) & 1 and words not in now]
    facts = {"bits": bits, "now": now, "since_start": before}
    if not now and not before:
        yield Finding("board", "voltage", Level.ok, "no under-voltage, not throttled since the start", "", facts)
        return
    text = "; ".join(filter(None, (f"now: {', '.join(now)}" if now else "", f"since the start: {', '.join(before)}" if before else "")))
    power = "under-voltage" in now + before
    advice = "use the official power supply (5 V 3 A for a Pi 4, 5 V 5 A for a Pi 5), a short cable, and feed disks on their own"
    yield Finding(
        "board", "voltage", Level.warning if now or power else Level.note, text, advice if power else "cool it: heat sink and fan", facts
    )


def _jetson(system: System, name: str) -> Iterator[Finding]:
    """The power mode: nvpmodel(8)'s configuration names them, its status file or the program tells which."""
    if "Jetson" not in name and not system.exists("/etc/nv_tegra_release"):
        return
    found = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=(\S+)\s*>", system.text("/etc/nvpmodel.conf"), re.MULTILINE)
    modes = {int(number): mode for number, mode in found}
    match = re.search(r"pmode:(\d{1,6})", system.text("/var/lib/nvpmodel/status")) or re.search(
        r"^NV Power Mode:.*\n(\d{1,4})$", system.command("nvpmodel", "-q"), re.MULTILINE
    )
    if not match:
        yield Finding("board", "power mode", Level.note, "not known", "see `sudo nvpmodel -q`")
        return
    now = int(match[1])
    best = max(modes, key=lambda number: _power(modes[number]), default=now)
    facts = {"mode": now, "name": modes.get(now, ""), "modes": modes}
    text = f"mode {now} ({modes.get(now, 'not named in /etc/nvpmodel.conf')})"
    if now in modes and _power(modes[best]) > _power(modes[now]):
        advice = f"`sudo nvpmodel -m {best}` ({modes[best]}) and `sudo jetson_clocks`: more power, more heat"
        yield Finding("board", "power mode", Level.note, text, advice, facts)
    else:
        yield Finding("board", "power mode", Level.ok, text, "", facts)


def _power(mode: str) -> float:
    """Watts that a mode's name tells; MAXN knows no limit."""
    match = re.search(r"(\d{1,4})W", mode)
    return float("inf") if "MAXN" in mode.upper() else float(match[1]) if match else 0.0
