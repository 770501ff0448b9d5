"""The configs of experiments, one in each file, returned by `get_config`."""
