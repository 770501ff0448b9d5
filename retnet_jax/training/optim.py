"""The optimiser: AdamW, muon (with Adam outside the layers' matrices), or one of the user's own."""

import jax
import optax

from retnet_jax.config import OptimizerConfig
from retnet_jax.errors import ConfigError
from retnet_jax.own_objects import is_own, own_object
from retnet_jax.shapes import Array, Int


def learning_rate_factor(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The factor by which the learning rates are multiplied at each of `steps` steps.

    It rises linearly from 0 to 1 in the warm-up steps. After them "constant" stays at 1; "linear"
    and "cosine" fall to 0 at the last step; "wsd" (warm-up, stable, decay) stays at 1 and falls
    linearly to 0 over the last `decay_share` of all steps.
    """
    after = steps - config.warmup_steps
    if config.schedule == "constant":
        main = optax.constant_schedule(1.0)
    elif config.schedule == "linear":
        main = optax.linear_schedule(1.0, 0.0, after)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(1.0, after)
    else:
        falling = min(round(config.decay_share * steps), after)
        main = optax.linear_schedule(1.0, 0.0, falling, transition_begin=after - falling)
    # Step 0 already has a rate above 0.
    rise = optax.linear_schedule(1 / (config.warmup_steps + 1), 1.0, max(config.warmup_steps, 1))
    return optax.join_schedules([rise, main], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clips by the global norm, then applies AdamW, muon or the user's own optimiser.

    Only matrices and convolutions have weight decay. Muon orthogonalises the update of every matrix
    in the layers, each [i o] of a stack [n i o] separately; all others, embedding and head too, are
    updated by Adam. A function named by "module:function" is called with the config and the
    learning rate's schedule.

    Raises:
      ConfigError: if that function is not found or does not return an optimiser.
    """
    factor = learning_rate_factor(config, steps)

    def rate(peak: float) -> optax.Schedule:
        return lambda step: peak * factor(step)

    if config.name == "adamw":
        optimizer = optax.adamw(
            rate(config.learning_rate),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        )
    elif is_own(config.name):
        optimizer = own_object("optimizer.name", config.name)(config, rate(config.learning_rate))
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ConfigError(
                f"optimizer.name={config.name!r} returned {optimizer!r}, not an "
                "optax.GradientTransformation"
            )
    else:
        optimizer = optax.contrib.muon(
            rate(config.muon_learning_rate),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_learning_rate=rate(config.learning_rate),
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    if config.moment_dtype != "float32":
        optimizer = _moments_kept_in(config.moment_dtype, optimizer)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def at_step(state: optax.OptState, step: Int[Array, ""]) -> optax.OptState:
    """The optimiser state with the counters of its learning-rate schedules set to a step.

    The schedules count updates, and a skipped step makes none. Without this they would lag behind
    the step, and a run with skipped steps would end before its schedule.
    """

    def is_schedule(x):
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda x: x._replace(count=step) if is_schedule(x) else x, state, is_leaf=is_schedule
    )


def _moments_kept_in(
    dtype: str, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimiser with its moments stored in `dtype` between steps; it computes in float32."""

    def cast(state, dtype):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(dtype) if {"mu", "nu"} & set(_names(path)) else x, state
        )

    def init(params):
        return cast(optimizer.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def is_matrix(model):
    """True for kernels, embedding, head and the weights of convolutions; otherwise False."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not {"scale", "bias", "feature_map"} & set(_names(path)), model
    )


def _muon_dimensions(model):
    matrix_in_stack = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: matrix_in_stack if "kernel" in _names(path) else None, model
    )


def _names(path) -> list[str]:
    return [getattr(key, "name", "") for key in path]
