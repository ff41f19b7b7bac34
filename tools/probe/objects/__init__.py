"""Do two positions of a map belong to one object? Sampled positions, readouts, controls and ablations."""
