"""The experiments behind the documentation: a trainer for the paper's runs, and the studies that use it.

Each command is a module: ``python -m ssam_experiments.train --help``.
"""

import importlib.util

MODULES = (
    "absl", "dm_pix", "grain", "matfree", "matplotlib", "orbax", "PIL", "pyarrow", "sklearn", "tqdm", "tyro",
)  # fmt: skip
"""What the package needs in addition to the library's own requirements. The extra installs all of them."""


if _missing := [module for module in MODULES if importlib.util.find_spec(module) is None]:
    raise ModuleNotFoundError(
        f"ssam_experiments needs {', '.join(_missing)}: pip install 'ssam_jax[experiments]'."
    )
