"""Sizes that kernels share with their hosts, which do not import numba."""

LANES = 8
"""Numbers of a vector."""
