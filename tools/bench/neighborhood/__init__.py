"""The benchmark of neighborhood attention, whose peers differ between a CPU and a GPU."""
