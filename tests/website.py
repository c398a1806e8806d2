"""The site builds with no network and asks no foreign host for anything. `make docs` names this file.

It is no part of the suite, whose environment lacks Sphinx, and builds what `make docs` leaves in docs/_build.
"""

import html.parser
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SITE = ROOT / "docs/_build/html"
OFFLINE = """
import socket, sys
connect = socket.socket.connect
def local(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise AssertionError(f"the build must not use the network, tried {address}")
    return connect(self, address)
socket.socket.connect = local
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""The elements by which a page loads something, with the attribute that says what."""


class Loaded(html.parser.HTMLParser):
    """Collects what a page loads, and which of its pictures say nothing to those who cannot see them."""

    def __init__(self):
        super().__init__()
        self.addresses, self.silent = [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        address = attributes.get(LOADS.get(tag, ""))
        if address and attributes.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.addresses.append(address)
        if tag == "img" and (attributes.get("alt") or ".png").endswith(".png"):  # nothing, or a file's name
            self.silent.append(address)


def read(page):
    found = Loaded()
    found.feed(page.read_text())
    return found


@pytest.fixture(scope="module")
def pages():
    options = ["--builder", "html", "--nitpicky", "--fail-on-warning", "--quiet", "--fresh-env"]
    command = [sys.executable, "-c", OFFLINE, *options, str(ROOT / "docs"), str(SITE)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    found = {path.relative_to(SITE).as_posix(): path for path in SITE.rglob("*.html")}
    return {name: path for name, path in found.items() if not name.startswith("_static/")}  # templates


def test_no_page_loads_anything_from_a_foreign_host(pages):
    loaded = {name: read(path).addresses for name, path in pages.items()}
    assert not {name: far for name, all_ in loaded.items() if (far := [a for a in all_ if "//" in a])}
    assert any("narrow.css" in address for address in loaded["index.html"])


def test_everything_that_a_page_loads_is_in_the_site(pages):
    for path in pages.values():
        for address in read(path).addresses:
            if not address.startswith(("data:", "#")):
                assert path.parent.joinpath(address.split("?")[0].split("#")[0]).exists(), (path, address)


def test_equations_are_drawn_by_one_file_of_the_site(pages):
    scripts = [a for a in read(pages["guides/algebra.html"]).addresses if "tex-svg" in a]
    assert len(scripts) == 1 and "\\frac" in pages["guides/algebra.html"].read_text()


def test_every_picture_has_words_for_those_who_cannot_see_it(pages):
    assert not {name: silent for name, path in pages.items() if (silent := read(path).silent)}


def test_the_reference_has_types_sources_and_links_to_other_libraries(pages):
    page = pages["api/carriers.html"].read_text()
    assert "_modules/ssam_jax/sam.html#ssam" in page and "typing.html#ssam_jax.typing.Schedule" in page
    assert "transformations.html#optax.GradientTransformation" in page


@pytest.mark.parametrize("name", ["first_steps", "algebra", "masks", "cheap_sam", "sharpness"])
def test_a_notebook_shows_its_outputs(pages, name):
    page = pages[f"notebooks/{name}.html"].read_text()
    assert page.count("cell_output") >= 3 and page.count("_images/") >= 2
    assert "Traceback" not in page


def test_an_old_address_leads_to_the_new_one(pages):
    assert "url=../sharding.html" in pages["guides/many_devices.html"].read_text()
