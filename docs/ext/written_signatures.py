"""Signatures as the source writes them: ``Params`` says more than ``Any``, which it is an alias of."""

import ast
import inspect
import textwrap
from typing import Any

from sphinx.application import Sphinx


def written(value: Any) -> tuple[str, str | None] | None:
    """Return the arguments of a function, or of a class of fields, and what it returns, as in its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body[0]
    except (OSError, TypeError):
        return None
    if isinstance(tree, ast.FunctionDef):
        _drop_self(tree.args)
        return f"({ast.unparse(tree.args)})", tree.returns and ast.unparse(tree.returns)
    has_fields = hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__")
    if isinstance(tree, ast.ClassDef) and has_fields:
        fields = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
        return f"({', '.join(map(ast.unparse, fields))})", None
    return None


def _drop_self(args: ast.arguments) -> None:
    for several in (args.posonlyargs, args.args):
        if several and several[0].arg == "self":
            del several[0]


def process(app: Sphinx, what: str, name: str, value: Any, options: Any, args: str, returns: str) -> Any:
    """Replace a signature by that of the source, if it has one."""
    return written(value) if what in ("function", "class", "method") else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the signatures."""
    app.connect("autodoc-process-signature", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
