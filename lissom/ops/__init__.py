"""Operators: one folder each, its definition in plain PyTorch beside its fast forms."""
