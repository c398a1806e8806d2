"""What is released: the files, the metadata, and that nothing of it or of the tests needs the network."""

import email
import pathlib
import re
import runpy
import socket
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import ssam_jax

ROOT = pathlib.Path(__file__).parent.parent
NAME = f"ssam_jax-{ssam_jax.__version__}"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder of a wheel and a source distribution, built without another environment."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return folder


def test_the_wheel_holds_the_packages_their_license_and_nothing_else(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    homes = {"ssam_jax": ROOT, "ssam_experiments": ROOT / "experiments"}
    sources = {
        path.relative_to(home).as_posix()
        for name, home in homes.items()
        for path in (home / name).rglob("*.py")
    }
    about = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert names == {*sources, "ssam_jax/py.typed", *about}


def test_the_metadata_is_that_of_the_project(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        found = email.message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
    assert (found["Name"], found["Version"]) == ("ssam_jax", ssam_jax.__version__)
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == PROJECT["project"]["requires-python"]
    plain = {line for line in found.get_all("Requires-Dist") if "extra ==" not in line}
    assert plain == set(PROJECT["project"]["dependencies"])
    assert set(found.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])
    assert found.get_payload().startswith("# ssam_jax")


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {ssam_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert headings[0] == ssam_jax.__version__


def test_links_of_readme_lead_to_the_repository_on_a_package_index():
    absolute = runpy.run_path(str(ROOT / "hatch_build.py"))["absolute"]
    text = '![a](b.png) [c](d.md) [e](#f) [g](https://h) <img src="i.gif" alt="j">'
    here = "https://example.org/us"
    assert absolute(text, here) == (
        f"![a]({here}/raw/main/b.png) [c]({here}/blob/main/d.md) [e](#f) [g](https://h)"
        f' <img src="{here}/raw/main/i.gif" alt="j">'
    )
    readme = absolute((ROOT / "README.md").read_text(), here)
    assert not re.findall(r'(?:\]\(|src=")(?!https?:)', readme)


def test_readme_fits_a_first_look():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_source_distribution_holds_what_its_own_tests_need(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    wanted = ("conftest.py", "tests/tiny.py", "examples/digits.py", "benchmarks/suite.py", "docs/two_pass.md")
    wanted += ("experiments/ssam_experiments/train.py", "experiments/tests/test_loop.py")
    wanted += ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "SECURITY.md")
    assert set(wanted) <= names
    assert not [name for name in names if ".venv" in name or "__pycache__" in name]


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])  # addresses for documentation
def test_a_test_that_uses_the_network_fails(address):
    with socket.socket() as connection, pytest.raises(AssertionError, match="must not use the network"):
        connection.connect(address)


def test_a_test_may_connect_to_its_own_machine():
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        assert client.getpeername() == server.getsockname()
