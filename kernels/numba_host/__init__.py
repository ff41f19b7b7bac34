"""Numba's host side, which all CPU kernels share.

`machine` says whether kernels can run on a CPU. `arrays` gives them tensors, and `threads` divides a call among as many
threads as PyTorch has, `openmp` among PyTorch's own. `fused_compile` compiles kernels once for each user and version.
`fused_maths` and `fused_vectors` hold what kernels are made from; `fused_constants` holds numbers that hosts need,
too. `fused_compile`, `fused_maths`, `fused_vectors` and the kernels (`<operator>/fused_cpu_kernels.py`) import
numba, and are imported at the first call.
"""
