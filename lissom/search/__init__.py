"""The search: budget, proposals, trials, runs on disk, and the choice among what was measured."""
