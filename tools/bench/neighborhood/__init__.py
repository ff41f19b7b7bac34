"""The benchmark of neighborhood attention; its peers differ between a CPU and a GPU."""
