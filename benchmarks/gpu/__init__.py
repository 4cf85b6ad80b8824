"""Benchmarks on a GPU: each module measures one thing, writes `gpu-<name>.json`, knows no other.

`python -m benchmarks.gpu` runs all of them in a budget of seconds; `--toy` runs each at a size that
a CPU computes, to see that they work. They need torch, Triton, numpy and the package's source.
"""
