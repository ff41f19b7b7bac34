"""Numbers that kernels share with their hosts, which do not import numba."""

LANES = 8
"""Numbers of a vector."""

WIDE = 16
"""Numbers of a wide vector: for long chains of operations, two registers of AVX2 at a time or one of AVX-512."""

LOG2_E = 1.4426950408889634
"""The logarithm of e to base 2: kernels compute powers of 2."""
