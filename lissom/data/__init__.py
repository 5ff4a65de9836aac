"""Readers of data sets and of untrusted files: folders, Parquet, Python data sets, and the embedded digits."""
