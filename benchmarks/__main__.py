"""`python -m benchmarks`: every benchmark, one after the other, each in its own process."""

from __future__ import annotations

import subprocess
import sys

NAMES = ("cli_help", "startup", "engine_overhead", "prefix_cache", "concurrent")


def main() -> int:
    failed = []
    for name in NAMES:
        print(f"== {name}", file=sys.stderr, flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
