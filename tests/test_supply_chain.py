"""What continuous integration runs is pinned: actions and hooks by commit, packages by hash, one index."""

import pathlib
import re
import tomllib

import packaging.requirements
import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LOCK = (ROOT / "requirements" / "ci.txt").read_text()
COMMIT = re.compile("[0-9a-f]{40}")


def steps(workflow):
    """Return the steps of all jobs."""
    return [step for job in yaml.safe_load(workflow)["jobs"].values() for step in job["steps"]]


def faults(workflow):
    """Return what is loose in a workflow."""
    found = []
    if yaml.safe_load(workflow).get("permissions") != {"contents": "read"}:
        found.append("permissions")
    for step in steps(workflow):
        name, _, commit = step.get("uses", "").partition("@")
        if name and not COMMIT.fullmatch(commit):
            found.append(f"{name} is not pinned by commit")
        if name == "actions/checkout" and step.get("with", {}).get("persist-credentials") is not False:
            found.append("checkout leaves credentials")
    for line in re.findall("uses: .*", workflow):
        if not re.search(r"@\w+  # v\d+\.\d+\.\d+$", line):
            found.append(f"{line} does not name its version")
    return found


LOOSE = """
permissions: {contents: read}
jobs:
  one:
    steps:
      - uses: actions/checkout@v4
"""


def test_actions_are_pinned_by_commit_and_leave_no_credentials():
    assert WORKFLOWS
    for path in WORKFLOWS:
        assert faults(path.read_text()) == [], path.name


def test_a_workflow_with_an_action_that_is_not_pinned_fails():
    pinned = LOOSE.replace("@v4", f"@{'0' * 40}  # v4.0.0\n        with: {{persist-credentials: false}}")
    assert faults(pinned) == []
    assert faults(LOOSE) == [
        "actions/checkout is not pinned by commit",
        "checkout leaves credentials",
        "uses: actions/checkout@v4 does not name its version",
    ]
    assert faults(pinned.replace("contents: read", "contents: write")) == ["permissions"]


def test_hooks_are_pinned_by_commit():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks and all(COMMIT.fullmatch(repo["rev"]) for repo in hooks)


def locked(text):
    """Return the versions of each package in a lock, and check that each has hashes."""
    versions = {}
    for entry in re.split(r"\n(?=\w)", re.sub("^#.*\n", "", text, flags=re.M).strip()):
        name, version = re.match(r"([\w.-]+)==(\S+)", entry).groups()
        assert "--hash=sha256:" in entry, name
        versions.setdefault(name, []).append(version)
    return versions


def declared():
    """Yield the requirements of the library, of its extras and groups, and of its build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    build = project["build-system"]["requires"]
    for lines in (project["project"]["dependencies"], build, *extras.values(), *groups.values()):
        yield from map(packaging.requirements.Requirement, lines)


def test_the_lock_has_hashes_for_all_that_the_project_asks_for():
    versions = locked(LOCK)
    for wanted in declared():
        if wanted.name == "ssam_jax":
            continue
        name = re.sub(r"[._-]+", "-", wanted.name).lower()
        there = versions.get(name, [])
        assert there and all(wanted.specifier.contains(v, prereleases=True) for v in there), (
            f"requirements/ci.txt has {there} for {wanted}: make lock"
        )


def test_a_package_without_a_hash_is_found():
    with pytest.raises(AssertionError, match="numpy"):
        locked("absl-py==2.0 \\\n    --hash=sha256:00\nnumpy==2.0\n")


def test_packages_come_from_one_index():
    """A second index could answer for a package of the first."""
    for path in (ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "pyproject.toml", *WORKFLOWS):
        found = re.findall(r"--extra-index-url|unsafe-\S+-match|--index[ =]|--find-links", path.read_text())
        assert found == [], path.name
    assert not re.findall("^(--index|--extra|-i |--find)", LOCK, flags=re.M)
