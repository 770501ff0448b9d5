"""The config that lives in `retnet_jax/configs/retnet_200m.py`."""

from retnet_jax.configs.retnet_200m import get_config  # noqa: F401
