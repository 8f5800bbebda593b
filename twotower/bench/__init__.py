"""Measures both towers in one process, without a service: random weights at any shape, recorded
commit schedules, floors from the ceilings of the same run, and plain PyTorch for comparison."""
