"""Grams of CO2 equivalent of electricity: by country, by cloud region, or as the user says.

Location-based yearly averages: no certificates or offsets of a provider are subtracted, and no PUE
(energy of cooling and distribution) is added. Reads codecarbon's `global_energy_mix.json` and
mlco2's `cloud_impact.csv` once, before the run; its header keeps the figure and the source.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure.meters import power_table

COUNTRY_FILE, REGION_FILE = "global_energy_mix.json", "cloud_impact.csv"
JOULES_PER_KWH = 3.6e6


class Carbon(msgspec.Struct, kw_only=True):
    """Grams of CO2 equivalent; None: not known, and why."""

    grams: float | None
    explanation: str


def intensity(
    *,
    tables: Path | None = None,
    country: str | None = None,
    cloud_region: str | None = None,
    g_per_kwh: float | None = None,
) -> dict[str, Any]:
    """Grams per kWh for a run's header: `g_per_kwh`, `source`, `explanation`; or `absent`.

    Raises:
        ConfigError: more than one of the three is given, or a table does not have what it names.
    """
    given = [
        name
        for name, value in (
            ("--country", country),
            ("--cloud-region", cloud_region),
            ("--gco2-per-kwh", g_per_kwh),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"`{'` and `'.join(given)}` exclude one another.")
    if g_per_kwh is not None:
        if not g_per_kwh >= 0:
            raise ConfigError(f"`--gco2-per-kwh` is `{g_per_kwh}`, which is less than 0.")
        return _said(g_per_kwh, "the user's figure", f"{g_per_kwh:g} g/kWh, the user's figure")
    if country is None and cloud_region is None:
        return {"absent": "no country or region was given; --country, --cloud-region"}
    folder = power_table.directory(tables)
    if folder is None:
        raise ConfigError(
            f"`{given[0]}` needs the tables of the folder `table-power-carbon`.",
            hint="name the directory that has it: --tables DIR, or PENSTOCK_DATA",
        )
    if country is not None:
        return _of_country(country, folder / COUNTRY_FILE)
    return _of_region(cloud_region or "", folder / REGION_FILE)


def grams(joules: float | None, settings: dict[str, Any]) -> Carbon:
    """CO2 equivalent of an energy, by `settings["carbon"]` of a run's header."""
    found = settings.get("carbon") or {"absent": "nothing was said about the electricity"}
    if "absent" in found:
        return Carbon(grams=None, explanation=found["absent"])
    if joules is None:
        return Carbon(grams=None, explanation="the energy is not known")
    return Carbon(
        grams=joules / JOULES_PER_KWH * found["g_per_kwh"], explanation=found["explanation"]
    )


def _of_country(country: str, file: Path) -> dict[str, Any]:
    wanted = country.strip().casefold()
    text = power_table.read(file)
    try:
        for code, entry in json.loads(text).items():
            if wanted in (code.casefold(), entry["country_name"].casefold()):
                told = (
                    f"{entry['carbon_intensity']:g} g/kWh, {entry['country_name']} "
                    f"{entry['year']}, yearly average"
                )
                return _said(entry["carbon_intensity"], power_table.file_source(file), told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"`{file}` is no table of countries: {error!r}.") from None
    raise ConfigError(
        f"`--country` is `{country}`, which `{COUNTRY_FILE}` does not have.",
        hint="give an ISO 3166 code of three letters, such as DEU, or the English name",
    )


def _of_region(region: str, file: Path) -> dict[str, Any]:
    provider, _, name = region.casefold().partition("/")
    rows = csv.DictReader(io.StringIO(power_table.read(file), newline=""))
    try:
        for row in rows:
            if name and (row["provider"].casefold(), row["region"].casefold()) == (provider, name):
                told = (
                    f"{float(row['impact']):g} g/kWh, {row['provider']}/{row['region']} "
                    f"({row['country']}); {row['source'].strip() or 'the table names no source'}"
                )
                return _said(float(row["impact"]), power_table.file_source(file), told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"`{file}` is no table of cloud regions: {error!r}.") from None
    raise ConfigError(
        f"`--cloud-region` is `{region}`, which `{REGION_FILE}` does not have.",
        hint="write PROVIDER/REGION, such as aws/eu-west-3, gcp/us-central1 or azure/westeurope",
    )


def _said(g_per_kwh: float, source: str, explanation: str) -> dict[str, Any]:
    return {"g_per_kwh": g_per_kwh, "source": source, "explanation": explanation}
