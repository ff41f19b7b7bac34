"""Sizes that kernels share with their hosts, which do not import numba."""

LANES = 8
"""Numbers of a vector."""

WIDE = 16
"""Numbers of a wide vector: for long chains of operations, two registers of AVX2 at a time or one of AVX-512."""
