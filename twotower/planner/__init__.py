"""What a service of two towers needs and gives on a kind of GPU, before anyone rents one."""
