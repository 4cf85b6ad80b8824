"""The CPU kernels: how their library is found, called, and given memory. Knows no models."""
