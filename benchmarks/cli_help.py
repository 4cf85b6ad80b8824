"""How long `penstock --help` takes, as a whole process, beside an empty Python process."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.common import environment, summary, write

NUM_RUNS = 15
HELP = [sys.executable, "-c", "from penstock.cli.main import main; main()", "--help"]
EMPTY = [sys.executable, "-c", "pass"]


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    before = environment()
    seconds(HELP)  # bytecode is compiled once
    pairs = [(seconds(HELP), seconds(EMPTY)) for _ in range(NUM_RUNS)]
    help_s = [pair[0] for pair in pairs]
    empty_s = [pair[1] for pair in pairs]
    write("cli_help", {"help_s": summary(help_s), "empty_python_s": summary(empty_s)}, before)


if __name__ == "__main__":
    main()
