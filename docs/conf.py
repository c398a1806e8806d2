"""How Sphinx builds the documentation: `make docs`, into docs/_build/html.

Neither the build nor the pages use the network: MathJax comes from a Python package, and ext/elsewhere.py
knows the addresses of other libraries' names.
"""

import importlib.util
import pathlib
import sys
import tomllib

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE / "ext"), str(HERE.parent)]

import ssam_jax  # noqa: E402

project = "ssam_jax"
author = "The ssam_jax authors"
project_copyright = "The ssam_jax authors, Apache-2.0"
version = release = ssam_jax.__version__

URLS = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"].get("urls", {})
"""Where the project is: "Repository" adds a button to each page, and one to notebooks that opens Colab."""

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "elsewhere",
    "moved_pages",
    "public_names",
    "written_signatures",
]
exclude_patterns = ["_build", "results"]

# In docstrings `name` is a link, to a name of the same module or of ssam_jax; one that leads nowhere fails
# the build. The objects of other libraries are written ``name``.
default_role = "py:obj"
nitpicky = True
nitpick_ignore = [  # a type variable, and what an alias unfolds to
    ("py:class", "T"),
    ("py:class", "jax.jaxlib._jax.Array"),
]

autosummary_generate = False  # the tables of docs/api link to what stands on the same pages
autodoc_default_options = {"member-order": "bysource"}
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
add_module_names = False
python_maximum_signature_line_length = 80

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The build runs the notebooks. tests/test_readme.py and tests/guides.py run the code of the pages.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # a progress bar that misses a widget

html_theme = "sphinx_book_theme"
html_title = "ssam_jax"
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "use_download_button": False,
    "navbar_persistent": [],  # the search field of the sidebar is enough
}
MATHJAX = pathlib.Path(*importlib.util.find_spec("mathjax").submodule_search_locations)
mathjax_path = "tex-svg.js"  # version 3 in one file, with its fonts in it
mathjax3_config = {"options": {"enableMenu": False}}  # the menu would fetch parts from afar

if "Repository" in URLS:
    html_theme_options |= {
        "repository_url": URLS["Repository"],
        "repository_branch": "main",
        "path_to_docs": "docs",
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }
html_static_path = ["_static", str(MATHJAX / "static/mathjax/es5/tex-svg.js")]
html_css_files = ["narrow.css"]
html_copy_source = False
html_show_sourcelink = False
