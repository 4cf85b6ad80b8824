"""Energy counters of the processor (RAPL: Intel, and AMD from Zen on) as Linux's powercap has them.

Knows files, nothing of phases. Each counter wraps at its own `max_energy_range_uj`; a wrap is seen
only if it is read at least once per round (minutes at full power).
"""

from __future__ import annotations

from pathlib import Path

import msgspec

POWERCAP = Path("/sys/class/powercap")


class Zone(msgspec.Struct):
    """One counter: `package-0`, `dram-0` (of package 0) or `psys`."""

    name: str
    file: Path
    range_uj: int


def _order(directory: Path) -> tuple[bool, str]:
    """Registers first: `intel-rapl-mmio` is a second way to the same counters."""
    return "mmio" in directory.name, directory.name


class Rapl:
    """Joules since this was made, per zone. `zones` is empty where nothing can be read: see `why`.

    Zones within a package (`core`, `uncore`) are parts of it and left out; `dram` is not. `psys`,
    the whole platform, is left out as well: what it covers differs from board to board.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self.why = ""
        self.zones: list[Zone] = []
        self._last_uj: dict[str, int] = {}
        self._total_uj: dict[str, int] = {}
        problems = [self._add(zone) for zone in sorted(powercap.glob("*-rapl*:*"), key=_order)]
        if not self.zones:
            found = [problem for problem in problems if problem]
            self.why = found[0] if found else f"the system has no counters in {powercap}"

    def read_j(self) -> dict[str, float]:
        """Joules per zone since this was made."""
        for zone in self.zones:
            try:
                now_uj = int(zone.file.read_text())
            except (OSError, ValueError):
                continue  # the next reading makes up for it
            step_uj = now_uj - self._last_uj[zone.name]
            if step_uj < 0:
                step_uj += zone.range_uj
            self._last_uj[zone.name] = now_uj
            self._total_uj[zone.name] += step_uj
        return {name: total_uj * 1e-6 for name, total_uj in self._total_uj.items()}

    def _add(self, directory: Path) -> str | None:
        """Take a zone up; says why it cannot."""
        try:
            name = (directory / "name").read_text().strip()
            if name.startswith("package-"):
                label = name
            elif name == "dram":
                label = f"dram-{directory.name.split(':')[1]}"
            else:
                return None
            if label in self._last_uj:
                return None  # a second way to the same counter, such as intel-rapl-mmio
            file = directory / "energy_uj"
            now_uj = int(file.read_text())
            range_uj = int((directory / "max_energy_range_uj").read_text())
        except PermissionError:
            return (
                f"{directory / 'energy_uj'} is readable by root only (since CVE-2020-8694); "
                "`chmod a+r` it, or measure as root"
            )
        except (OSError, ValueError) as error:
            return f"{directory}: {error}"
        self.zones.append(Zone(label, file, range_uj))
        self._last_uj[label], self._total_uj[label] = now_uj, 0
        return None
