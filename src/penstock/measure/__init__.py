"""Measuring: load, quality, memory, energy, cost, and the verdict. No torch, no engine needed.

Raw records come first (`records`), in a directory of their own (`run`); every figure is a pure
function of them (`kinds`), so that `penstock verify` can compute it again.
"""
