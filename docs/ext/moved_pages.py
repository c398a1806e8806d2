"""Pages whose address changed: each old one leads on to the new one."""

import pathlib
import posixpath

from sphinx.application import Sphinx

MOVED = {"guides/many_devices": "sharding"}
PAGE = (
    '<!doctype html><meta charset="utf-8"><title>Moved</title>'
    '<meta http-equiv="refresh" content="0; url={0}"><a href="{0}">This page moved.</a>\n'
)


def write(app: Sphinx, exception: Exception | None) -> None:
    """Write a page at each old address."""
    if exception or app.builder.name != "html":
        return
    for old, new in MOVED.items():
        path = pathlib.Path(app.outdir, f"{old}.html")
        target = posixpath.relpath(f"{new}.html", posixpath.dirname(old))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PAGE.format(target))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the pages."""
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
