"""What docstrings, comments and pages refer to exists: names, files, headings, arguments, make targets.

In docstrings and comments a `name` in single backticks is one of this library, as it is for Sphinx; any other
name stands in double backticks. On pages, where all code stands in single ones, a bare name must occur in the
code of this repository, of the page, or of a library that it uses.
"""

import ast
import builtins
import functools
import importlib
import inspect
import io
import keyword
import re
import subprocess
import tokenize
from pathlib import Path

import flax.linen
import flax.nnx
import jax
import optax
from test_readme import BLOCKS, PAGES

import ssam_jax

ROOT = Path(__file__).parent.parent
FOLDERS = ("ssam_jax", "experiments", "examples", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "ssam_jax")]
FACES = ("ssam_jax.sharpness", "ssam_jax.plotting", "ssam_jax.linen", "ssam_jax.nnx")
"""Modules whose names are public but not in ssam_jax itself."""

ENDINGS = "py|md|ipynb|gif|toml|json|jsonl|cff|png|css|yml"
FOREIGN = {  # files of other projects, and files that programs write
    *(
        "solver/sam.py",
        "configs/defaulf_cfg.py",
        "pytorch_optimizer/optimizer/sam.py",
    ),  # docs/guides/moving.md
    "asam.py",  # of ASAM's authors
    *(
        "metrics.jsonl",
        "config.json",
        "manifest.json",
        "results.json",
        "table.md",
        "name.png",
        "contours.png",
    ),
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def wrong(found):
    """Return what is wrong, by the file in which it is."""
    return {name: sorted(set(items)) for name, items in found if items}


# What is written.


def docstrings(path):
    """Yield every docstring of a file, those of attributes too."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Expr(ast.Constant(str(text))):
                yield text


def comments(path):
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


@functools.cache
def words(path):
    """Return all that a file says in words."""
    return "\n".join([*docstrings(path), *comments(path)])


def without_blocks(page):
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)


def spans(text):
    """Yield what stands in backticks on a page."""
    yield from (span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))


def code_in_words(text):
    """Yield what stands in double backticks in a docstring."""
    yield from (" ".join(span.split()) for span in re.findall(r"``([^`]+)``", text))


# What exists.


@functools.cache
def files():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if listed.returncode == 0:
        return {name for name in listed.stdout.split() if (ROOT / name).exists()}
    return {name_of(path) for path in ROOT.rglob("*") if path.is_file()}  # a source distribution


@functools.cache
def is_name(dotted):
    """Whether a dotted name leads to a module, or to an attribute of one, or of a class in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return all_there(found, parts[length:])
    return False


def all_there(found, parts):
    for part in parts:
        if part in getattr(found, "__annotations__", ()) or part in getattr(
            found, "__dataclass_fields__", ()
        ):
            return True
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@functools.cache
def identifiers():
    """Return every name that occurs in the repository's code, as a name, attribute, argument or string."""
    found = set(dir(builtins)) | set(keyword.kwlist) | {"__init__", "__all__"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            found |= names_in(node)
    for module in (jax, jax.lax, jax.nn, jax.numpy, jax.debug, jax.experimental, jax.sharding, jax.random):
        found |= set(dir(module))
    for module in (optax, optax.contrib, flax.linen, flax.nnx):
        found |= set(dir(module))
    return found | {path.stem for path in SOURCES} | {path.parent.name for path in SOURCES}


def names_in(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return set(re.findall(r"\w+", node.value)) if len(node.value) < 40 else set()
    values = (getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname"))
    return {value for value in values if isinstance(value, str)}


def names_of_page(page):
    trees = [ast.parse(block) for block in BLOCKS[page]]
    return {name for tree in trees for node in ast.walk(tree) for name in names_in(node)}


# Names.


def test_every_dotted_name_in_words_leads_somewhere():
    assert not wrong(
        (name_of(path), [name for name in dotted_names(words(path)) if not is_name(name)]) for path in SOURCES
    )


def test_every_dotted_name_on_a_page_leads_somewhere():
    assert not wrong(
        (page, [name for name in dotted_names(PAGES[page]) if not is_name(name)]) for page in PAGES
    )


def dotted_names(text):
    """Return what looks like a name below a package of ours; a file ending makes it a file."""
    found = re.findall(r"(?<![\w/.-])(ssam_(?:jax|experiments)(?:\.\w+)+)", text)
    return {name for name in found if name.rsplit(".", 1)[1] not in ENDINGS.split("|")}


def test_every_name_in_single_backticks_is_one_of_the_library():
    assert not wrong(
        (name_of(path), [n for n in single_backticks(path) if not is_known(n, path)]) for path in LIBRARY
    )


def single_backticks(path):
    return re.findall(r"(?<![`\w])`([A-Za-z_][\w.]*)`(?![`_\w])", words(path))


def is_known(name, path):
    """Whether a file, its neighbors, a public face, or a class of the file has a name."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    homes = [module, module.rpartition(".")[0], "ssam_jax", *FACES]
    homes += [f"ssam_jax.{factor}" for factor in ("directions", "radii", "combine")]
    homes += [
        f"{module}.{node.name}" for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    ]
    return is_name(name) or any(is_name(f"{home}.{name}") for home in homes)


def test_every_bare_name_on_a_page_occurs_in_code():
    known = identifiers() | OTHERS
    assert not wrong((page, bare_names(page) - names_of_page(page) - known) for page in PAGES)


def bare_names(page):
    """Return what can be no word: names with an underscore or a capital in them."""
    return {s for s in spans(without_blocks(page)) if re.fullmatch(r"[A-Za-z]\w*_\w*|[A-Z]\w+[a-z]\w*", s)}


OTHERS = {  # names of other projects
    *("first_step", "second_step", "use_gc", "perturb_eps", "base_optimizer", "adv_optimizer", "sync_period"),
    *("reset_state", "batch_axis_name", "update_freq", "num_samples", "drop_rate", "drop_strategy"),
    *("growth_strategy", "T_end", "opaque_mode", "weight_decay", "custom_jvp", "custom_vjp", "io_callback"),
    *("check_vma", "param_dtype", "jax_enable_x64", "stateless_call", "optim_state"),
}


# Arguments.


def public(name):
    """Return what a name in a call means: one of ssam_jax, or of its modules of factors."""
    found = ssam_jax
    for part in name.removeprefix("ssam_jax.").split("."):
        found = getattr(found, part, None)
    return found if callable(found) and getattr(found, "__module__", "").startswith("ssam_jax") else None


def unknown_arguments(code):
    """Yield the keyword arguments in a piece of code that the function called does not take."""
    try:
        tree = ast.parse(code.strip())
    except SyntaxError:
        return
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = public(ast.unparse(call.func))
        if function is None:
            continue
        parameters = inspect.signature(function).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        yield from (
            f"{ast.unparse(call.func)}({k.arg}=)" for k in call.keywords if k.arg and k.arg not in parameters
        )


def test_an_unknown_argument_is_noticed():
    assert list(unknown_arguments("optax.chain(ssam(0.1, form='implicit'), x)")) == ["ssam(form=)"]
    assert not list(unknown_arguments("ssam(0.1, combine=combine.gsam(alpha=0.1), ascent_steps=3)"))


def test_every_call_on_a_page_passes_arguments_that_exist():
    code = {page: [*spans(without_blocks(page)), *BLOCKS[page]] for page in PAGES}
    assert not wrong(
        (page, [u for piece in pieces for u in unknown_arguments(piece)]) for page, pieces in code.items()
    )


def test_every_call_in_words_passes_arguments_that_exist():
    code = {name_of(path): code_in_words(words(path)) for path in SOURCES}
    assert not wrong(
        (name, [u for piece in pieces for u in unknown_arguments(piece)]) for name, pieces in code.items()
    )


# Files.


def paths_in(text):
    """Yield the names of files in a text, with or without a folder."""
    yield from re.findall(rf"(?<![\w/:<>*{{}}.-])((?:[\w.-]+/)*\w[\w-]*\.(?:{ENDINGS}))(?![\w/(-])", text)


def is_file(name, folder):
    """Whether a file is there: from the root, from a folder, or anywhere if no folder is said."""
    if name in FOREIGN:
        return True
    from_folder = (folder / name).resolve()
    if name in files() or (from_folder.is_relative_to(ROOT) and name_of(from_folder) in files()):
        return True
    return any(known.endswith(f"/{name}") for known in files())


def test_every_file_in_words_exists():
    assert not wrong(
        (name_of(path), [name for name in paths_in(words(path)) if not is_file(name, path.parent)])
        for path in SOURCES
    )


def pages_in_messages():
    """Return the pages that the strings of the library name, docstrings aside, by file."""
    texts = {path: "".join(strings(path)) for path in LIBRARY}
    return {name_of(path): set(re.findall(r"docs/[\w/]+\.md", text)) for path, text in texts.items()}


def strings(path):
    """Yield the strings of a file's code, with a space where values come in."""
    docstring = set(docstrings(path))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstring:
            yield node.value + " "


def test_errors_name_the_page_that_has_the_remedy():
    named = pages_in_messages()
    assert not wrong((name, [page for page in pages if page not in PAGES]) for name, pages in named.items())
    assert len(set().union(*named.values())) >= 6


def test_an_install_line_is_the_same_everywhere():
    """No package index has this library, so that its name would install another's."""
    texts = PAGES | {name_of(path): path.read_text() for path in SOURCES if path != Path(__file__)}
    other = {
        name: re.findall(r"pip install [^\n]*?ssam[_-]jax\b(?!\.)", text) for name, text in texts.items()
    }
    allowed = r"pip install '\.\[[^\n']*\]' in a clone of ssam_jax"
    assert not wrong(
        (name, [f for f in found if not re.fullmatch(allowed, f)]) for name, found in other.items()
    )


def test_every_file_on_a_page_exists():
    texts = {page: re.sub(r"https?://\S+", "", without_blocks(page)) for page in PAGES}
    homes = {page: (ROOT / page).parent for page in PAGES}
    assert not wrong(
        (page, [n for n in paths_in(texts[page]) if not is_file(n, homes[page])]) for page in PAGES
    )


# Headings and targets.


def anchors(page):
    """Return the anchors that a site and a forge make of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_to_a_heading_has_one():
    assert not wrong(
        (page, [link for link in heading_links(page) if not has_heading(page, *link)]) for page in PAGES
    )


def heading_links(page):
    return re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", PAGES[page])


def has_heading(page, target, anchor):
    home = name_of(((ROOT / page).parent / target).resolve()) if target else page
    return anchor in anchors(home)


def test_every_make_target_on_a_page_exists():
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert not wrong((page, set(make_targets(page)) - known) for page in PAGES)


def make_targets(page):
    """Yield the targets of the commands ``make target target VARIABLE=value`` on a page."""
    for span in spans(PAGES[page]):
        if span.startswith("make "):
            yield from re.findall(r"(?<= )[a-z-]+(?= |$)", span)


# The table of the algebra.


def test_the_table_of_spellings_has_a_row_for_each_test_of_a_paper():
    page = PAGES["docs/guides/algebra.md"]
    table = page[page.index("| name | source") :].split("\n\n")[0]
    rows = {line.split("|")[1].strip() for line in table.splitlines()[2:]}
    spelled = set(re.findall(r'^    "([^"]+)": (?:ssam|carried)\(', page, flags=re.M))
    assert set(names_of_papers()) <= rows == spelled


def names_of_papers():
    """Return the keys of the tables in tests/test_papers.py, in the spelling of the pages."""
    for node in ast.parse((ROOT / "tests/test_papers.py").read_text()).body:
        match node:
            case ast.Assign([ast.Name("TWO" | "CARRIED")], ast.Dict(keys)):
                yield from (key.value.replace("normalised", "normalized") for key in keys)
