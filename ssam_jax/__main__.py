"""``python -m ssam_jax`` prints the versions and devices that a bug report needs."""

import importlib.metadata
import platform

import jax

PACKAGES = ("ssam_jax", "jax", "jaxlib", "optax", "flax", "chex", "numpy")


def report() -> str:
    """Return the versions of this library and what it stands on, and JAX's devices, a line each."""
    lines = {name: _version(name) for name in PACKAGES}
    lines |= {"python": platform.python_version(), "platform": platform.platform()}
    kinds = [device.device_kind for device in jax.devices()]
    counted = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    lines["devices"] = f"{jax.default_backend()}: {counted}"
    lines["processes"] = str(jax.process_count())
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _version(name: str) -> str:
    """Return the version of a package as it is installed, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
