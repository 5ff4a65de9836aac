"""Proofs: one published claim each, in small, with the system beside its own baseline in the same run."""
