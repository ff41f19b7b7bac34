"""Benchmarks of operators: one entry per operator, with shapes and a plain PyTorch peer; `benchmark` measures them."""
