"""Numba's host side, which all CPU kernels share.

`machine` says whether kernels can run on a CPU, and compiles them once for each user and version. `threads` divides a call
among as many threads as PyTorch has. `fused_maths` holds functions of vectors that kernels are made from; like the kernels
(`<operator>/fused_cpu_kernels.py`) it imports numba, at the first call.
"""
