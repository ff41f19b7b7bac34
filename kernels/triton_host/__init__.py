"""The host side of Triton kernels, shared by all operators.

`machine` says whether kernels can run on a device, and how products are rounded. `blocks` says how attention kernels
are cut into blocks. `fused_tiles` holds the building blocks of kernels; it alone imports triton, at the first launch.
"""
