"""A check of Sphinx's: every public name of the library is in the API reference, and has a docstring."""

import importlib
import types
from typing import Any, TypeVar

from sphinx.application import Sphinx
from sphinx.util import logging

MODULES = (
    "ssam_jax",
    "ssam_jax.directions",
    "ssam_jax.radii",
    "ssam_jax.combine",
    "ssam_jax.linen",
    "ssam_jax.nnx",
    "ssam_jax.sharpness",
    "ssam_jax.plotting",
)
"""What users import from."""

HOMES = (
    *MODULES,
    "ssam_jax.typing",
    "ssam_jax.masks.rule",
    "ssam_jax.masks.dynamic",
    "ssam_jax.ascent.radii",
    "ssam_jax.two_pass.active",
)
"""Where the names in docstrings and signatures are from."""


def public_names(module: types.ModuleType) -> dict[str, Any]:
    """Return what a module offers: what its ``__all__`` names, or what is defined in it, modules left out."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not (name.startswith("_") or isinstance(value, TypeVar))
        and (getattr(value, "__module__", None) or "").startswith(_home(module))
    ]
    found = {name: getattr(module, name) for name in names}
    return {name: value for name, value in found.items() if not isinstance(value, types.ModuleType)}


def _home(module: types.ModuleType) -> str:
    return "ssam_jax" if hasattr(module, "__path__") else module.__name__


def offered(name: str) -> dict[str, Any]:
    """Return the public names of one of `MODULES`."""
    package, _, attribute = name.partition(".")
    found = getattr(importlib.import_module(package), attribute, None) or importlib.import_module(name)
    return public_names(found)


def is_documented(module: str, name: str, value: Any, documented: dict[str, Any]) -> bool:
    """Whether the reference has a name, as one of its module or of ssam_jax."""
    same = getattr(importlib.import_module("ssam_jax"), name, None) is value
    return f"{module}.{name}" in documented or (same and f"ssam_jax.{name}" in documented)


def says_something(value: Any) -> bool:
    """Whether a value has a docstring of its own: not inherited, nor made by dataclass or NamedTuple."""
    text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    return bool(text) and not text.startswith(f"{value.__name__}(")


def check(app: Sphinx, env: Any) -> None:
    """Warn, which fails the build, of every public name that the reference lacks or that says nothing."""
    documented = env.get_domain("py").objects
    logger = logging.getLogger(__name__)
    for module in MODULES:
        for name, value in offered(module).items():
            full = f"{module}.{name}"
            if not is_documented(module, name, value, documented):
                logger.warning("public name %s is not in docs/api", full)
            if not says_something(value):
                logger.warning("public name %s has no docstring", full)


def resolve(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Resolve a `name` that its own module lacks in ssam_jax or in another of `HOMES`."""
    name, domain = node["reftarget"], env.get_domain("py")
    if node.get("refdomain") == "py":
        for target in (f"{module}.{name}" for module in HOMES):
            if target in domain.objects:
                return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the check and the links."""
    app.connect("env-check-consistency", check)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
