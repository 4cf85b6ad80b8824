"""Benchmarks: each module has `run(settings) -> Result` and writes `results/<name>.json`."""
