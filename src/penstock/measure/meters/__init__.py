"""Meters: memory, energy, carbon and money. `sampler` reads, the others compute from what it wrote.

`settings.MeterSettings` are the options, `settings.prepare` puts what figures need into a run's
header, `figures.meter_figures` makes the figures of a window.
"""
