"""Modules that several networks share."""
