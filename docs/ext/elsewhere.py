"""Where the documentation of other libraries has a name, known without the network.

Sphinx's intersphinx fetches an inventory of each library; this table replaces it for the names that our
pages and docstrings mention. JAX has a page for each public name, optax and Flax a page for each group.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

JAX = "https://docs.jax.dev/en/latest/_autosummary/"
OPTAX = "https://optax.readthedocs.io/en/latest/api/"
FLAX = "https://flax.readthedocs.io/en/latest/api_reference/"
MATPLOTLIB = "https://matplotlib.org/stable/api/"
NUMPY = "https://numpy.org/doc/stable/reference/"
PYTHON = "https://docs.python.org/3/library/"

SHORT = {"jnp.": "jax.numpy.", "lax.": "jax.lax.", "nnx.": "flax.nnx.", "nn.": "flax.linen."}
"""How our pages spell the modules of other libraries."""

JAX_NAMES = (
    *("Array", "ShapeDtypeStruct", "checkpoint", "debug.print", "distributed.initialize", "eval_shape"),
    *("grad", "jit", "lax.cond", "lax.scan", "lax.top_k", "make_mesh", "pure_callback", "set_mesh"),
    *("shard_map", "typing.ArrayLike", "value_and_grad", "vmap"),
)

PAGES = {  # of optax, flax and Python, with the names that each has anchors for
    f"{OPTAX}transformations.html": (
        *("GradientTransformation", "GradientTransformationExtraArgs", "OptState", "EmptyState"),
        *("add_decayed_weights", "centralize", "clip_by_global_norm", "ema", "identity", "scale"),
        *("scale_by_sign", "set_to_zero", "trace"),
    ),
    f"{OPTAX}optimizer_wrappers.html": ("MultiSteps", "apply_if_finite", "lookahead", "masked"),
    f"{OPTAX}optimizers.html": ("adam", "adamw", "lion", "sgd"),
}
UNANCHORED = {
    "optax.chain": f"{OPTAX}combining_optimizers.html",
    "optax.named_chain": f"{OPTAX}combining_optimizers.html",
    "optax.partition": f"{OPTAX}combining_optimizers.html",
    "optax.multi_transform": f"{OPTAX}combining_optimizers.html",
    "optax.inject_hyperparams": f"{OPTAX}optimizer_schedules.html",
    "optax.linear_schedule": f"{OPTAX}optimizer_schedules.html",
    "optax.cosine_decay_schedule": f"{OPTAX}optimizer_schedules.html",
    "optax.contrib.sam": f"{OPTAX}contrib.html",
    "optax.contrib.schedule_free": f"{OPTAX}contrib.html",
    "flax.nnx.Optimizer": f"{FLAX}flax.nnx/training/optimizer.html",
    "flax.nnx.Module": f"{FLAX}flax.nnx/module.html",
    "flax.nnx.State": f"{FLAX}flax.nnx/state.html",
    "filterlib.Filter": "https://flax.readthedocs.io/en/latest/guides/filters_guide.html",
    "matplotlib.axes.Axes": f"{MATPLOTLIB}_as_gen/matplotlib.axes.Axes.html",
    "matplotlib.figure.Figure": f"{MATPLOTLIB}_as_gen/matplotlib.figure.Figure.html",
    "matplotlib.Axes3D": f"{MATPLOTLIB}toolkits/mplot3d/axes3d.html",
    "numpy.ndarray": f"{NUMPY}generated/numpy.ndarray.html",
    "typing.Any": f"{PYTHON}typing.html#typing.Any",
    **{
        f"collections.abc.{name}": f"{PYTHON}collections.abc.html#collections.abc.{name}"
        for name in ("Callable", "Iterable", "Mapping", "Sequence", "Hashable")
    },
}

ADDRESSES = {
    **{f"jax.{name}": f"{JAX}jax.{name}.html" for name in JAX_NAMES},
    **{f"optax.{name}": f"{page}#optax.{name}" for page, names in PAGES.items() for name in names},
    **UNANCHORED,
}
IMPORTED = ("typing.", "collections.", "matplotlib.")
BARE = {name.rpartition(".")[2]: name for name in UNANCHORED if name.startswith(IMPORTED)}
"""Names that our source imports from their modules."""


def address(name: str) -> str | None:
    """Return the address of a name of another library as we spell it, or None if the table lacks it."""
    for short, full in SHORT.items():
        if name.startswith(short):
            name = full + name.removeprefix(short)
    return ADDRESSES.get(BARE.get(name, name))


def resolve(app: Sphinx, env: Any, node: Any, contnode: Any) -> nodes.reference | None:
    """Resolve the name of a type in a signature."""
    found = address(node["reftarget"]) if node.get("refdomain") == "py" else None
    return found and nodes.reference("", "", contnode, refuri=found, internal=False)


class LinkCode(SphinxPostTransform):
    """Make code that names a thing of another library, or calls it, a link."""

    default_priority = 20

    def run(self, **kwargs: Any) -> None:
        """Visit the code in the words of a page."""
        for literal in list(self.document.findall(nodes.literal)):
            linked = literal.parent and any(isinstance(p, nodes.reference) for p in ancestors(literal))
            name = re.fullmatch(r"([\w.]+)(\(.*\))?", literal.astext(), re.DOTALL)
            found = name and "." in name[1] and address(name[1])
            if found and not linked:
                link = nodes.reference("", "", literal.deepcopy(), refuri=found, internal=False)
                literal.replace_self(link)


def ancestors(node: nodes.Node) -> Any:
    """Yield the nodes that contain a node."""
    while node.parent is not None:
        yield (node := node.parent)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the links."""
    app.connect("missing-reference", resolve)
    app.add_post_transform(LinkCode)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
