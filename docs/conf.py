"""How Sphinx builds the documentation: `make docs`, into docs/_build/html."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE / "ext"), str(HERE.parent)]

import ssam_jax  # noqa: E402

project = "ssam_jax"
author = "The ssam_jax authors"
project_copyright = "The ssam_jax authors, Apache-2.0"
version = release = ssam_jax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "public_names",
]
exclude_patterns = ["_build", "results"]

# In docstrings `name` is a link, to a name of the same module or of ssam_jax; one that leads nowhere fails
# the build. The objects of other libraries are written ``name``.
default_role = "py:obj"
nitpicky = True

autodoc_typehints = "none"  # docstrings say it in words; the types are unions a screen long
autodoc_default_options = {"member-order": "bysource"}
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
add_module_names = False
python_maximum_signature_line_length = 80

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = (
    "off"  # tests/test_readme.py runs the code of every page, in `make test` and in `make docs`
)

html_theme = "sphinx_book_theme"
html_title = "ssam_jax"
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "use_download_button": False,
    "navbar_persistent": [],  # the search field of the sidebar is enough
}
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_copy_source = False
html_show_sourcelink = False
