"""The config that lives in `retnet_jax/configs/quickstart.py`."""

from retnet_jax.configs.quickstart import get_config  # noqa: F401
