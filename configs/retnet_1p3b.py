"""The config that lives in `retnet_jax/configs/retnet_1p3b.py`."""

from retnet_jax.configs.retnet_1p3b import get_config  # noqa: F401
