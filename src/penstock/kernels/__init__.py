"""Operations on a GPU: Triton kernels, each beside its reference in plain torch.

Knows tensors; knows neither models nor requests. One file an operation. `registry.OPS` lists them,
and one test enumerates that list.
"""
