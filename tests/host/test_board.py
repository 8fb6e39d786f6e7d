"""What the board's sensors and counters say, or do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from spac.host import board


def put(root: Path, **files: object) -> None:
    for name, value in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


def test_a_board_without_sensors(tmp_path: Path) -> None:
    meter = board.Meter(tmp_path)
    meter.start()
    assert meter.result() == {"energy_source": "none here: CPU seconds and bytes read for each token stand in"}


def test_rapl_clock_temperature_and_pressure(tmp_path: Path) -> None:
    rapl, sensors = "sys/class/powercap/intel-rapl:0", "sys/class/thermal/thermal_zone0/temp"
    pressure = "some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0"
    clock = "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    put(tmp_path, **{f"{rapl}/energy_uj": 9_000_000, f"{rapl}/max_energy_range_uj": 10_000_000, sensors: 41_000, clock: 2_400_000})
    put(tmp_path, **{"proc/pressure/io": pressure.format(1_000_000)})
    meter = board.Meter(tmp_path)
    meter.start()
    put(tmp_path, **{f"{rapl}/energy_uj": 2_000_000, sensors: 62_000, clock: 1_500_000, "proc/pressure/io": pressure.format(3_500_000)})
    found = meter.result()
    assert found["energy_j"] == 3.0  # the counter wrapped at 10 J
    assert found["energy_source"] == "RAPL, packages"
    assert found["temperature_c"] == {"first": 41.0, "highest": 62.0}
    assert found["clock_mhz"] == {"lowest": 1500.0, "highest": 2400.0}
    assert found["pressure_s"] == {"io_some": 2.5, "io_full": 0.0}


def test_a_jetsons_power(tmp_path: Path) -> None:
    folder = "sys/class/hwmon/hwmon1"
    put(tmp_path, **{f"{folder}/name": "ina3221", f"{folder}/in1_label": "VDD_IN", f"{folder}/in1_input": 5000, f"{folder}/curr1_input": 1200})
    assert board.power_w(tmp_path) == ("INA3221 VDD_IN", 6.0)


def test_a_pis_power() -> None:
    text = " 3V7_WL_SW_A current(0)=0.10000000A\n VDD_CORE_A current(7)=2.0A\n 3V7_WL_SW_V volt(8)=3.7V\n VDD_CORE_V volt(15)=0.75V\n EXT5V_V volt(24)=5.1V\n"
    assert board.pmic_total_w(text) == pytest.approx(0.37 + 1.5)
    assert board.pmic_total_w("") is None
