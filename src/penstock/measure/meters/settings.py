"""What a user may say about power, carbon and prices, and what a run's header keeps of it.

Owns the options; the tables they name are read by `power_model`, `carbon` and `prices`. The
invariant: figures are made from `prepare`'s result alone, so that they can be computed again where
no table is.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.meters import carbon, nvml, power_model, price_lists, prices


@dataclass(frozen=True, kw_only=True)
class MeterSettings:
    """Options of every command that measures energy or money; see `cli.options.options_of`."""

    meter_interval: float = field(
        default=1.0, metadata={"help": "Seconds between readings of the meters; 0: none."}
    )
    tables: str | None = field(
        default=None,
        metadata={
            "help": "Directory with table-power-carbon and table-prices; else PENSTOCK_DATA."
        },
    )
    cpu_watts: float | None = field(
        default=None,
        metadata={"help": "Power of this machine's CPUs when all of them are busy."},
    )
    idle_watts: float | None = field(
        default=None,
        metadata={"help": "Power of this machine's CPUs when none is busy; with --cpu-watts."},
    )
    chip_threads: int | None = field(
        default=None,
        metadata={
            "help": "Hardware threads of the whole CPU, where this machine has a part of it."
        },
    )
    gpu_watts: float | None = field(
        default=None, metadata={"help": "Power of one busy GPU, where it does not say."}
    )
    whole_machine: bool = field(
        default=False,
        metadata={
            "help": "This machine's energy is the server's, although its process is not known."
        },
    )
    country: str | None = field(
        default=None,
        metadata={
            "help": "Country whose electricity is used: ISO 3166 code of 3 letters, or name."
        },
    )
    cloud_region: str | None = field(
        default=None, metadata={"help": "PROVIDER/REGION whose electricity is used: aws/eu-west-3."}
    )
    gco2_per_kwh: float | None = field(
        default=None, metadata={"help": "Grams of CO2 equivalent of a kWh."}
    )
    prices: str | None = field(
        default=None, metadata={"help": "Your prices.toml; its entries precede those of lists."}
    )
    usd_per_hour: float | None = field(
        default=None, metadata={"help": "Price of the machine that serves, per hour."}
    )
    usd_per_kwh: float | None = field(default=None, metadata={"help": "Price of electricity."})


def tables_dir(settings: MeterSettings) -> Path | None:
    """Where the tables are: `--tables`, else PENSTOCK_DATA; None: nobody said.

    Raises:
        ConfigError: the directory that was named is not there.
    """
    told = settings.tables or os.environ.get("PENSTOCK_DATA")
    if not told:
        return None
    if not Path(told).is_dir():
        field_name = "--tables" if settings.tables else "PENSTOCK_DATA"
        raise ConfigError(f"`{field_name}` names `{told}`, which is no directory.")
    return Path(told)


def load_prices(settings: MeterSettings) -> prices.Prices:
    """The prices of `--prices` and of the lists.

    Raises:
        ConfigError: the file or a list is damaged.
    """
    path = Path(settings.prices) if settings.prices else None
    return prices.load(path, tables_dir(settings))


def prepare(settings: MeterSettings, gpu_names: Sequence[str] | None = None) -> dict[str, Any]:
    """What goes into `Header.settings`: `power`, `carbon` and `machine_price`.

    Args:
        gpu_names: of this machine; None: those that NVML finds.

    Raises:
        ConfigError: a value is out of range, or names what its table does not have.
    """
    for name, value in dataclasses.asdict(settings).items():
        if isinstance(value, float | int) and not 0 <= value < math.inf:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"`{flag}` is `{value}`; give a number that is not below 0.")
    tables = tables_dir(settings)
    if gpu_names is None:
        gpus, _ = nvml.find()
        gpu_names = [] if gpus is None else gpus.names
    machine = price_lists.MachinePrice()
    if settings.prices:
        _, machine = price_lists.read_user(Path(settings.prices))
    per_hour, per_kwh = settings.usd_per_hour, settings.usd_per_kwh
    return {
        "power": power_model.power_model(
            tables=tables,
            cpu_watts=settings.cpu_watts,
            idle_watts=settings.idle_watts,
            chip_threads=settings.chip_threads,
            gpu_watts=settings.gpu_watts,
            gpu_names=gpu_names,
            whole_machine=settings.whole_machine,
        ),
        "carbon": carbon.intensity(
            tables=tables,
            country=settings.country,
            cloud_region=settings.cloud_region,
            g_per_kwh=settings.gco2_per_kwh,
        ),
        "machine_price": {
            "usd_per_hour": machine.usd_per_hour if per_hour is None else per_hour,
            "usd_per_kwh": machine.usd_per_kwh if per_kwh is None else per_kwh,
        },
    }
