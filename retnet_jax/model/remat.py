"""Which activations of a layer are stored for the backward pass; the others are recomputed.

`checkpoint_name` gives activations their names where they are computed; `config.KEPT` lists the
names that `config.model.remat` can have:

    mixer_input, ffn_input   a layer's normed inputs (`lm.Block`); without `post_norm`
    q, k, v, gate            projections of the mixer, before the convolution and the rotation
    retention                outputs of retention or attention, before norm and gate
    out                      output of the mixer
    up, linear               inner projections of the feed-forward
    state_before             with positions split over devices: the state before a device's part
"""

from collections.abc import Callable

import jax

from retnet_jax.config import ModelConfig
from retnet_jax.ops.flash_attention import is_cudnn


def remat_policy(config: ModelConfig) -> Callable:
    """The policy of `jax.checkpoint` that stores the activations named by `config.remat`.

    It always stores "state_before", which came from other devices.
    """
    policies = jax.checkpoint_policies
    states = policies.save_only_these_names("state_before")
    if config.remat == "full":
        return states
    if config.remat == "dots":
        return policies.save_from_both_policies(states, policies.dots_with_no_batch_dims_saveable)
    names = config.kept_activations
    if config.remat.startswith("offload:"):
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["state_before"],
            names_which_can_be_offloaded=list(names),
            offload_src="device",
            offload_dst="pinned_host",
        )
    kept = policies.save_only_these_names("state_before", *names)
    return policies.save_from_both_policies(kept, is_cudnn) if "retention" in names else kept
