"""TensorRT: the plan for open sizes, the documented operators (`operators.csv`), and engines on an NVIDIA GPU."""
