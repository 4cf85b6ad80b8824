"""penstock against other engines on the same shapes, in turn: `python -m benchmarks.peers`."""
