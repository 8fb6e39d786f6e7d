"""What the board itself says: temperature, clock, energy, and pressure (PSI). Whatever is not there is left out of the record."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRESSURES = ("cpu", "io", "memory")


def temperature_c(root: Path = Path("/")) -> float | None:
    """The hottest thermal zone, degrees Celsius."""
    found = [v for path in root.glob("sys/class/thermal/thermal_zone*/temp") if (v := _number(path)) is not None]
    return max(found) / 1000 if found else None


def clock_mhz(root: Path = Path("/")) -> float | None:
    """The slowest core's clock now: a throttled board shows here."""
    found = [v for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq") if (v := _number(path)) is not None]
    return min(found) / 1000 if found else None


def pressure_s(root: Path = Path("/")) -> dict[str, float]:
    """Seconds that tasks of the whole machine have waited since it started, by resource (Documentation/accounting/psi.rst)."""
    found = {}
    for name in PRESSURES:
        try:
            text = (root / "proc/pressure" / name).read_text(errors="replace")
        except OSError:
            continue
        found.update({f"{name}_{kind}": int(total) / 1e6 for kind, total in re.findall(r"^(some|full) .*total=(\d+)", text, re.MULTILINE)})
    return found


def energy_uj(root: Path = Path("/")) -> dict[str, tuple[int, int]]:
    """RAPL's packages: (microjoules so far, where the counter wraps), by zone (Documentation/power/powercap/powercap.rst)."""
    found = {}
    for zone in root.glob("sys/class/powercap/intel-rapl:[0-9]"):
        now, wrap = _number(zone / "energy_uj"), _number(zone / "max_energy_range_uj")
        if now is not None:
            found[zone.name] = (int(now), int(wrap or 0))
    return found


def power_w(root: Path = Path("/")) -> tuple[str, float] | None:
    """Power of the board now and who says so: a Jetson's INA3221 (rail VDD_IN), or a Raspberry Pi 5's PMIC."""
    for folder in root.glob("sys/class/hwmon/hwmon*"):
        if _text(folder / "name") != "ina3221":
            continue
        for label in folder.glob("in*_label"):
            channel = re.sub(r"\D", "", label.name)
            volt, ampere = _number(folder / f"in{channel}_input"), _number(folder / f"curr{channel}_input")
            if _text(label) == "VDD_IN" and volt is not None and ampere is not None:
                return "INA3221 VDD_IN", volt * ampere / 1e6  # millivolts and milliamperes
    return _pmic_w() if root == Path("/") else None


def _pmic_w() -> tuple[str, float] | None:
    if shutil.which("vcgencmd") is None:
        return None
    try:
        text = subprocess.run(["vcgencmd", "pmic_read_adc"], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    total = pmic_total_w(text)
    return ("Raspberry Pi PMIC, sum of its rails", total) if total is not None else None


def pmic_total_w(text: str) -> float | None:
    """The sum of volts times amperes over all rails that `vcgencmd pmic_read_adc` shows; it misses what USB devices take."""
    amperes = {rail: float(value) for rail, value in re.findall(r"(\w+)_A current\(\d+\)=([\d.]+)A", text)}
    volts = {rail: float(value) for rail, value in re.findall(r"(\w+)_V volt\(\d+\)=([\d.]+)V", text)}
    both = [amperes[rail] * volts[rail] for rail in amperes if rail in volts]
    return sum(both) if both else None


@dataclass
class Meter:
    """Watches the board during one run: `start`, `sample` now and then, `result`."""

    root: Path = Path("/")
    _started: dict[str, Any] = field(default_factory=dict)
    _temperatures: list[float] = field(default_factory=list)
    _clocks: list[float] = field(default_factory=list)
    _power: list[tuple[float, float]] = field(default_factory=list)  # (time, watts)
    _source: str = ""

    def start(self) -> None:
        """Take the first readings."""
        self._started = {"pressure": pressure_s(self.root), "energy": energy_uj(self.root)}
        self.sample()

    def sample(self) -> None:
        """Take readings that are not counters."""
        for value, found in ((temperature_c(self.root), self._temperatures), (clock_mhz(self.root), self._clocks)):
            if value is not None:
                found.append(value)
        power = power_w(self.root)
        if power is not None:
            self._source = power[0]
            self._power.append((time.monotonic(), power[1]))

    def result(self) -> dict[str, Any]:
        """What was seen since the start."""
        self.sample()
        found: dict[str, Any] = {}
        if self._temperatures:
            found["temperature_c"] = {"first": self._temperatures[0], "highest": max(self._temperatures)}
        if self._clocks:
            found["clock_mhz"] = {"lowest": min(self._clocks), "highest": max(self._clocks)}
        before = self._started["pressure"]
        pressure = {key: round(value - before.get(key, 0), 6) for key, value in pressure_s(self.root).items()}
        if pressure:
            found["pressure_s"] = pressure
        joules, source = self._energy()
        if joules is not None:
            found["energy_j"], found["energy_source"] = joules, source
        else:
            found["energy_source"] = "none here: CPU seconds and bytes read for each token stand in"
        return found

    def _energy(self) -> tuple[float | None, str]:
        before, after = self._started["energy"], energy_uj(self.root)
        if after:
            used = 0
            for zone, (now, wrap) in after.items():
                difference = now - before.get(zone, (now, 0))[0]
                used += difference if difference >= 0 else difference + wrap
            return used / 1e6, "RAPL, packages"
        if len(self._power) > 1:
            pairs = zip(self._power, self._power[1:], strict=False)
            return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairs), f"{self._source}, sampled"
        return None, ""


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
