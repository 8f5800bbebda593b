"""Speed of both towers in one process, without a service: random weights at any shape, recorded
commit schedules, floors of the same run's own ceilings, and plain PyTorch beside it."""
