"""Capacity planning: memory and tokens/s of a two-tower service on a kind of GPU."""
