"""Benchmarks of operators: an entry each, with its shapes and its plain PyTorch peer; `benchmark` measures them all."""
