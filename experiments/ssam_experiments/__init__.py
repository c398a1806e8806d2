"""The experiments behind the documentation: a trainer for the paper's runs, and the studies that use it.

Each command is a module: ``python -m ssam_experiments.train --help``.
"""

import importlib.util

DEMO = ("matfree", "matplotlib", "sklearn", "tqdm", "tyro")
"""What the demo needs in addition to the library's own requirements. The extra ``demo`` installs it."""

TRAINER = ("absl", "dm_pix", "grain", "orbax", "PIL", "pyarrow")
"""What the trainer and its data need besides. The extra ``experiments`` installs both."""


def require(modules: tuple[str, ...], extra: str) -> None:
    """Raise ModuleNotFoundError, naming modules that are missing and the extra that has them."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ModuleNotFoundError(
            f"ssam_experiments needs {', '.join(missing)}: pip install '.[{extra}]' in a clone of ssam_jax."
        )


require(DEMO, "demo")
