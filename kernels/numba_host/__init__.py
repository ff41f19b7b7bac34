"""Numba's host side, which all CPU kernels share.

`machine` says whether kernels can run on a CPU. `arrays` gives them tensors, and `threads` divides a call among
PyTorch's number of threads. `fused_compile` compiles kernels once for each user and version. `fused_maths` and
`fused_vectors` hold what kernels are made from, `fused_sizes` what their hosts know of it. All but the last of these
files and the kernels (`<operator>/fused_cpu_kernels.py`) import numba, at the first call.
"""
