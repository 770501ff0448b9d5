"""Names of the leaves of a tree of arrays, and dictionaries of leaves by name."""

from typing import Any

import jax


def leaf_name(path) -> str:
    """The name of the leaf at a path, such as model/layers/mixer/q/kernel."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value")  # the array inside an nnx.Param


def named_leaves(tree: Any) -> dict[str, Any]:
    """All leaves of a tree by name."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def with_leaves(like: Any, leaves: dict[str, Any]) -> Any:
    """A tree with the structure of `like`, and leaves taken from `leaves` by name."""
    paths = jax.tree_util.tree_flatten_with_path(like)[0]
    return jax.tree.unflatten(
        jax.tree.structure(like), [leaves[leaf_name(path)] for path, _ in paths]
    )


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of leaves, one level for each part of a name."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        level = root
        for parent in parents:
            level = level.setdefault(parent, {})
        level[last] = leaf
    return root
