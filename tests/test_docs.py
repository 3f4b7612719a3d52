"""README.md and docs/: what they quote from the code, name and link to is there, and lines fit."""
import ast
import fnmatch
import glob
import importlib
import os
import re
import textwrap

import pytest

import config
from lab import bench

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WIDTH = 100  # columns of a line of prose or a row of a table
EQUATIONS = ["A.1", "A.2", "A.3", "A.4", "A.5", "A.6", "A.7"]
PAGES = ["README.md"] + [os.path.relpath(path, ROOT)
                         for path in sorted(glob.glob(os.path.join(ROOT, "docs", "*.md")))]


def read(path):
    with open(os.path.join(ROOT, path)) as f:
        return f.read()


def python_files(*folders):
    """{path: text} of our Python files in these folders below the root."""
    paths = [path for folder in folders for path in glob.glob(os.path.join(ROOT, folder, "*.py"))]
    return {os.path.relpath(path, ROOT): read(path) for path in sorted(paths)}


CODE = python_files("", "fast", "zoo", "support", "lab")
TESTS = python_files("tests") | {"test_gmm.py": CODE.pop("test_gmm.py")}


# ---- the appendix beside the code ----------------------------------------------------------------
def sections(text):
    """{heading: text below it} of the second level."""
    parts = re.split(r"^## (.*)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def section_of(equation):
    """The text of the section of docs/appendix_a.md whose heading starts with the equation."""
    texts = [text for heading, text in sections(read("docs/appendix_a.md")).items()
             if heading.startswith(equation)]
    assert len(texts) == 1, f"{len(texts)} sections of docs/appendix_a.md start with {equation}"
    return texts[0]


def blocks(text):
    """The ```python blocks of a text."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)


def stands_in(block, code):
    """Whether the lines of a block stand in the code one after the other, at any indentation."""
    block, code = textwrap.dedent(block).splitlines(), code.splitlines()
    windows = (code[i:i + len(block)] for i in range(len(code) - len(block) + 1))
    return any(textwrap.dedent("\n".join(window)).splitlines() == block for window in windows)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_appendix_quotes_each_equation_from_gmm(equation):
    """Its formula, and the very lines of gmm.py that compute it, with the comment of its number."""
    text = section_of(equation)
    assert "$$" in text, f"{equation} is not printed as a formula"
    quoted = blocks(text)
    for block in quoted:
        assert stands_in(block, CODE["gmm.py"]), f"{equation}: gmm.py has no such lines:\n{block}"
    assert any(f"# {equation} " in block for block in quoted), f"no line of code for {equation}"


def test_appendix_leaves_no_equation_of_gmm_out():
    """Every line `# A.n  formula` of gmm.py stands in the section of A.n."""
    tagged = re.findall(r"^ *(# (A\.\d)  .*)", CODE["gmm.py"], flags=re.M)
    assert {equation for _, equation in tagged} == set(EQUATIONS)
    for line, equation in tagged:
        assert any(line in block for block in blocks(section_of(equation))), line


def test_quotations_are_found_at_any_indentation_and_whole_alone():
    code = "def f(x):\n    # why\n    if x:\n        return 1\n    return 2\n"
    assert stands_in("if x:\n    return 1\n", code)
    assert stands_in("return 2\n", code)
    assert not stands_in("if x:\nreturn 1\n", code)
    assert not stands_in("# why\nreturn 2\n", code)


# ---- names ---------------------------------------------------------------------------------------
def without_blocks(text):
    """The text without its ``` blocks, as many lines as before."""
    return re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.S | re.M)


def code_words(page):
    """What stands between single backticks in the prose and the tables of a page."""
    return sorted(set(re.findall(r"`([^`\n]+)`", without_blocks(read(page)))))


def definitions(text):
    """{class: names defined in it}, and the functions, of a file's text."""
    classes, functions = {}, set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            classes[node.name] = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            functions.add(node.name)
    return classes, functions


TEST_FUNCTIONS = {name for text in TESTS.values() for name in definitions(text)[1]}
CLASSES = {name: methods for text in CODE.values()
           for name, methods in definitions(text)[0].items()}
MODULES = {path[:-3].replace(os.sep, ".") for path in CODE}


def what_is_missing(word):
    """A sentence if a word in backticks names something of ours that is not there, else None."""
    if "NAME" in word or word in ("train/", "val/"):  # the reader's own
        return None
    if re.fullmatch(r"[\w/]+\.(py|md|png)|results/\w+\.csv|[\w/]+/", word):
        if not os.path.exists(os.path.join(ROOT, word)):
            return f"there is no {word}"
    elif re.fullmatch(r"test_[\w*]+", word):
        if not fnmatch.filter(TEST_FUNCTIONS, word):
            return f"no test is called {word}"
    elif re.fullmatch(r"[A-Za-z]\w*(\.\w+)+", word):
        return missing_attribute(word)
    return None


def missing_attribute(word):
    """`module.name`, `module.Class.name` or `Class.name`; None for names that are not ours."""
    first, *rest = word.split(".")
    if first in CLASSES:
        return None if rest[0] in CLASSES[first] else f"{first} defines no {rest[0]}"
    modules = [m for m in MODULES if word.startswith(m + ".")]
    if not modules:
        return None
    thing = importlib.import_module(max(modules, key=len))
    for name in word[len(max(modules, key=len)) + 1:].split("."):
        if not hasattr(thing, name):
            return f"{word}: there is no {name}"
        thing = getattr(thing, name)
    return None


@pytest.mark.parametrize("page", PAGES)
def test_files_tests_and_functions_that_a_page_names_exist(page):
    missing = [sentence for word in code_words(page) if (sentence := what_is_missing(word))]
    assert not missing, f"{page}: {'; '.join(missing)}"


def test_the_check_of_names_knows_right_from_wrong():
    there = ["gmm.py", "fast/", "zoo/live.py", "gmm.eta_at", "OnlineGMM.update", "zoo.live.Live",
             "fast.gmm.FastGMM", "test_A2_by_hand", "test_A1_*", "torch.distributions", "config.py"]
    absent = ["gnn.py", "slow/", "gmm.beta_at", "OnlineGMM.downdate", "zoo.live.Dead",
              "test_A9_*", "test_nothing", "docs/nothing.md"]
    assert [what_is_missing(word) for word in there] == [None] * len(there)
    assert all(what_is_missing(word) for word in absent)


def parsers_of_scripts():
    """The command line of train.py, and of each script of zoo/ that adds flags of its own."""
    parsers = [config.parser()]
    for path in CODE:
        if path.startswith("zoo") and re.search(r"^def flags\(", CODE[path], flags=re.M):
            parsers.append(config.parser())
            importlib.import_module(path[:-3].replace(os.sep, ".")).flags(parsers[-1])
    return parsers


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_names_exist(page):
    """In its prose; the commands in its blocks are parsed elsewhere."""
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", " ".join(code_words(page))))
    there = set(re.findall(r"[\"'](--[A-Za-z][\w-]*)[\"']", "\n".join(CODE.values())))
    there |= {"--node_rank", "--master_addr"}  # of torchrun
    for parser in (bench.parser(), *parsers_of_scripts()):  # they know --no-FLAG, and sizes
        there |= set(parser._option_string_actions)
    assert named <= there, f"{page}: no flag {' '.join(sorted(named - there))}"


# ---- links and lines -----------------------------------------------------------------------------
def anchors(text):
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)", without_blocks(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(read(page))):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(ROOT, target)), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(read(target)), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_prose_or_table_is_wider_than_a_screen(page):
    wide = [f"line {n} has {len(line)}: {line[:40]}..."
            for n, line in enumerate(without_blocks(read(page)).splitlines(), 1)
            if len(line) > WIDTH]
    assert not wide, f"{page}: {'; '.join(wide)}"


@pytest.mark.parametrize("page", PAGES)
def test_no_item_of_a_list_has_run_into_the_one_before(page):
    assert not re.findall(r"[.:;] \* \S.*", without_blocks(read(page)))


def test_every_page_is_linked_from_the_readme():
    links = re.findall(r"\]\(([^)\s]+)\)", read("README.md"))
    assert set(PAGES[1:]) <= set(links)
