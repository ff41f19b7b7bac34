"""Triton's host side, which all operators share.

`machine` says whether kernels can run on a device, and how products are rounded. `blocks` says how attention kernels
are cut. `fused_tiles` holds the pieces that kernels are made from; it alone imports triton, at the first launch.
"""
