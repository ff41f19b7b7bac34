"""Code that tests share: contracts that families inherit, tiny data sets, golden packs, and runs of Triton kernels."""
