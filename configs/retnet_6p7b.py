"""The config that lives in `retnet_jax/configs/retnet_6p7b.py`."""

from retnet_jax.configs.retnet_6p7b import get_config  # noqa: F401
