"""Experiments: one a file, each with a `get_config`."""
