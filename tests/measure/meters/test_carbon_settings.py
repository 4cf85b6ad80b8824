"""Grams of CO2 by country and region, and the options that lead to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from penstock.cli.options import build, options_of
from penstock.errors import ConfigError
from penstock.measure.meters.carbon import grams, intensity
from penstock.measure.meters.settings import MeterSettings, load_prices, prepare


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "data_dir" not in request.fixturenames:
        monkeypatch.delenv("PENSTOCK_DATA", raising=False)


@pytest.mark.parametrize(
    ("country", "g_per_kwh"),
    [("FRA", 56.039), ("france", 56.039), ("DEU", 380.95), ("Germany", 380.95)],
)
def test_a_country_has_its_electricity(data_dir: Path, country: str, g_per_kwh: float) -> None:
    found = intensity(tables=data_dir, country=country)
    assert found["g_per_kwh"] == g_per_kwh
    assert "2023" in found["explanation"]
    assert "global_energy_mix.json" in found["source"]
    # 7200 J are 2 Wh: 0.002 kWh.
    assert grams(7200.0, {"carbon": found}).grams == pytest.approx(0.002 * g_per_kwh)


def test_a_cloud_region_has_its_own(data_dir: Path) -> None:
    found = intensity(tables=data_dir, cloud_region="AWS/eu-west-3")
    assert found["g_per_kwh"] == 105
    assert "France" in found["explanation"]
    assert grams(3.6e6, {"carbon": found}).grams == pytest.approx(105)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"country": "XYZ"}, "`--country` is `XYZ`"),
        ({"cloud_region": "aws"}, "`--cloud-region` is `aws`"),
        ({"cloud_region": "scaleway/"}, "`--cloud-region` is `scaleway/`"),
        ({"country": "FRA", "g_per_kwh": 3.0}, "`--country` and `--gco2-per-kwh` exclude"),
    ],
)
def test_what_the_tables_do_not_have_is_refused(
    data_dir: Path, told: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        intensity(tables=data_dir, **told)


def test_without_a_place_there_are_no_grams() -> None:
    settings = {"carbon": intensity()}
    found = grams(100.0, settings)
    assert found.grams is None
    assert "--country" in found.explanation
    with pytest.raises(ConfigError, match="`--country` needs the tables"):
        intensity(country="FRA")
    settings = {"carbon": intensity(g_per_kwh=50.0)}
    assert grams(3.6e6, settings).grams == pytest.approx(50)
    assert grams(None, settings).grams is None
    assert grams(1.0, {}).grams is None


def test_options_become_what_a_header_keeps(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text("[machine]\nusd_per_hour = 2\nusd_per_kwh = 0.25\n")
    seen: list[dict[str, Any]] = []

    @click.command()
    @options_of(MeterSettings)
    def command(**values: Any) -> None:
        settings = build(MeterSettings, values)
        seen.append(prepare(settings, gpu_names=["NVIDIA X"]))
        assert settings.meter_interval == 0.5

    line = f"--cpu-watts 65 --idle-watts 9.5 --usd-per-hour 1.5 --prices {tmp_path}/prices.toml"
    arguments = [*line.split(), "--gco2-per-kwh", "20", "--meter-interval", "0.5"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert seen[0]["power"]["cpu"]["busy_w"] == 65
    assert seen[0]["power"]["cpu"]["idle_w"] == 9.5
    assert "absent" in seen[0]["power"]["gpus"][0]
    assert seen[0]["carbon"]["g_per_kwh"] == 20
    assert seen[0]["machine_price"] == {"usd_per_hour": 1.5, "usd_per_kwh": 0.25}


def test_nothing_said_is_nothing_assumed() -> None:
    found = prepare(MeterSettings(), gpu_names=[])
    assert "absent" in found["power"]["cpu"]
    assert "absent" in found["carbon"]
    assert found["machine_price"] == {"usd_per_hour": None, "usd_per_kwh": None}
    assert len(load_prices(MeterSettings())) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (MeterSettings(cpu_watts=-1.0), "`--cpu-watts` is `-1.0`"),
        (MeterSettings(usd_per_kwh=float("nan")), "`--usd-per-kwh` is `nan`"),
        (MeterSettings(tables="/nowhere"), "`--tables` names `/nowhere`"),
    ],
)
def test_a_wrong_value_is_named(settings: MeterSettings, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prepare(settings, gpu_names=[])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("global_energy_mix.json", None),
        ("global_energy_mix.json", "{"),
        ("global_energy_mix.json", '{"FRA": {}}'),
        ("cloud_impact.csv", None),
        ("cloud_impact.csv", "provider,region\naws,x"),
        ("cloud_impact.csv", "provider,region,impact,country,source\naws,x,much,FR,"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, file: str, text: str | None) -> None:
    (tmp_path / "cpu_power.csv").write_text("Name,TDP\n")
    if text is not None:
        (tmp_path / file).write_text(text)
    place = {"country": "FRA"} if file.endswith("json") else {"cloud_region": "aws/x"}
    with pytest.raises(ConfigError, match=file):
        intensity(tables=tmp_path, **place)
