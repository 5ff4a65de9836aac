"""Operators: functions and modules of plain PyTorch, usable alone, that know nothing of networks."""
