"""Runs on a config's data: the evaluation of a checkpoint, the comparison of backbones, the demo."""
