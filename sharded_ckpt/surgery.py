"""Changing the module tree of a model by dotted paths."""

from __future__ import annotations

import difflib

from torch import nn

from patchers.errors import ConfigError
from patchers.names import fold_indices


def set_submodule(model: nn.Module, module_name: str, new_submodule: nn.Module) -> None:
    """Replace a submodule of a model.

    Only the place that is named changes: a module that also stands elsewhere in the model stays there.

    Args:
        model: The model.
        module_name: Dotted path of a place that exists, through indexes of `ModuleList` and `Sequential` and
            keys of `ModuleDict`: "model.layers.3.mlp".
        new_submodule: What is to stand there.

    Raises:
        ConfigError: There is no such place, and nothing has changed. The text names the part of the path that
            exists and the names that come closest.
        TypeError: `new_submodule` is not a module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        >>> set_submodule(model, "1.0", nn.Identity())
        >>> model[1][0]
        Identity()
    """
    if not isinstance(new_submodule, nn.Module):
        raise TypeError(
            f"new_submodule for {module_name!r} is a {type(new_submodule).__name__}, not a Module"
        )
    if not module_name:
        raise ConfigError("the module name is empty; the model itself cannot be replaced from within")
    *path, leaf = module_name.split(".")
    parent = model
    for depth, name in enumerate(path):
        child = parent._modules.get(name)  # getattr would follow modules that lend the attributes of another
        if child is None:
            raise ConfigError(_no_such_place(model, module_name, parent, path[:depth], name))
        parent = child
    if leaf not in parent._modules:
        raise ConfigError(_no_such_place(model, module_name, parent, path, leaf))
    setattr(parent, leaf, new_submodule)


def _no_such_place(model: nn.Module, module_name: str, parent: nn.Module, path: list[str], name: str) -> str:
    prefix = ".".join(path)
    names = list(parent._modules)
    where = (
        f"{prefix!r} is a {type(parent).__name__}" if prefix else f"the model is a {type(parent).__name__}"
    )
    text = f"there is no submodule {module_name!r}: {where} without {name!r}; {_show(names)}"
    close = [".".join([*path, match]) for match in difflib.get_close_matches(name, names)]
    close += [found for found, _ in model.named_modules() if found.endswith("." + module_name)]
    return text + (f". Did you mean {' or '.join(map(repr, close[:3]))}?" if close else "")


def _show(names: list[str]) -> str:
    if not names:
        return "it has no submodules"
    if all(name.isdecimal() for name in names):
        return f"it has {fold_indices(map(int, names))}"
    return f"it has {', '.join(names)}"
