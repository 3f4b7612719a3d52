"""The rules of the house: who imports whom, lines, flags, equations, commands, public names."""
import argparse
import ast
import glob
import importlib
import inspect
import os
import re
import runpy
import shlex
import sys

import pytest

import collapse
import config
import eval_knn
import forked
import gmm
import heads
import losses
import models
import train
from conftest import ROOT
from support import rules

FOLDERS = ("", "fast", "zoo", "support", "lab")  # of our code; "" is the root
PAGES = ["README.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT))]


def read(path):
    with open(os.path.join(ROOT, path)) as file:
        return file.read()


def python_files(*folders):
    """Paths below the root of the .py files in these folders."""
    return [path for folder in folders
            for path in sorted(glob.glob(os.path.join(folder, "*.py"), root_dir=ROOT))]


def sources():
    """{module: text} of our code, tests aside."""
    paths = [path for path in python_files(*FOLDERS) if not path.startswith("test_")]
    return {module_of(path): read(path) for path in paths}


def module_of(path):
    """"fast/gmm.py" -> "fast.gmm", "fast/__init__.py" -> "fast"."""
    return path.removesuffix(".py").replace(os.sep, ".").removesuffix(".__init__")


def folder_of(module):
    folder = module.split(".")[0]
    return folder if folder in FOLDERS else "root"


# ---- imports -----------------------------------------------------------------------------------
def imports(module, text, ours):
    """[(imported module, line, whether inside a function)] of the modules `ours`, in a text.

    `from fast import gmm` imports fast.gmm if that is a module, and fast otherwise. A call
    import_module("NAME") counts too.
    """
    imported = []

    def visit(node, in_function):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[:-node.level] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            members = [f"{base}.{alias.name}" for alias in node.names]
            names = [member if member in ours else base for member in members]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        else:
            names = []
        imported.extend((name, node.lineno, in_function) for name in names if name in ours)
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(text), False)
    return imported


def graph(texts):
    """{module: modules that it imports anywhere} of {module: text}."""
    return {module: {name for name, _, _ in imports(module, text, texts)}
            for module, text in texts.items()}


def circle(graph):
    """A list [a, b, ..., a] in which each module imports the next one; None if there is none."""
    finished = set()

    def search(module, path):
        if module in path:
            return [*path[path.index(module):], module]
        if module in finished:
            return None
        for imported in sorted(graph[module]):
            if closed := search(imported, [*path, module]):
                return closed
        finished.add(module)
        return None

    for module in sorted(graph):
        if closed := search(module, []):
            return closed
    return None


def test_no_module_imports_itself_in_a_circle():
    """Imports inside functions count as well: they only hide that two files are one."""
    closed = circle(graph(sources()))
    assert not closed, f"these modules import each other: {' -> '.join(closed)}"


def test_circles_are_found_also_inside_functions():
    texts = {"a": "import b", "b": "from fast import c", "fast": "", "fast.c": "import math"}
    assert circle(graph(texts)) is None
    inside = {**texts, "fast.c": "def f():\n    from a import g"}
    assert circle(graph(inside)) == ["a", "b", "fast.c", "a"]
    relative = {**texts, "fast.c": "from . import d", "fast.d": "import fast.c"}
    assert circle(graph(relative)) == ["fast.c", "fast.d", "fast.c"]
    by_call = {**texts, "fast.c": "import importlib\nx = importlib.import_module('b')"}
    assert circle(graph(by_call)) == ["b", "fast.c", "b"]
    assert circle({"a": {"a"}}) == ["a", "a"]


# folder: the folders that its files may import anywhere, and inside functions alone
ALLOWED = {
    "root": ({"root", "support"}, {"fast", "zoo"}),
    "support": ({"root", "support"}, set()),
    "fast": ({"root", "support", "fast"}, set()),
    "zoo": ({"root", "support", "fast", "zoo"}, set()),
    "lab": ({"root", "support", "fast", "zoo", "lab"}, set()),
}


def forbidden(texts):
    """Sentences about imports that the table above does not allow."""
    sentences = []
    for module, text in texts.items():
        anywhere, in_functions = ALLOWED[folder_of(module)]
        for name, line, in_function in imports(module, text, texts):
            folder = folder_of(name)
            allowed = folder in anywhere or in_function and folder in in_functions
            if not allowed:
                sentences.append(f"{module}, line {line}, imports {name}")
            starters = ("lab.chaos", "lab.fuzz", "lab.hosts", "lab.products")
            if name == "train" and folder_of(module) != "zoo" and module not in starters:
                sentences.append(f"{module}, line {line}, imports train, which only "
                                 f"{', '.join(starters)} and scripts of zoo/ may")
    return sentences


def test_imports_point_one_way():
    """Root files stand on support/, nobody on lab/, and train.py is where everything ends.

    Root files may use fast/ and zoo/ where they need them, inside functions.
    """
    sentences = forbidden(sources())
    assert not sentences, "; ".join(sentences)


def test_imports_that_point_the_other_way_are_found():
    texts = {"a": "", "train": "import a", "fast.a": "import a", "lab.chaos": "import train"}
    assert not forbidden(texts)
    assert not forbidden({**texts, "a": "def f():\n    from fast import a"})
    for module, text in [("a", "from fast import a"), ("a", "def f():\n    import lab.chaos"),
                         ("support.a", "import fast.a"), ("fast.a", "import zoo.a"),
                         ("zoo.b", "from lab import chaos"), ("lab.b", "import train"),
                         ("support.a", "def f():\n    from train import main")]:
        assert len(forbidden({"zoo.a": "", **texts, module: text})) == 1, (module, text)


def test_no_code_imports_the_tests():
    tests = {module_of(os.path.basename(path)) for path in python_files("", "tests")
             if os.path.basename(path).startswith(("test_", "conftest"))}
    assert "test_house" in tests and "conftest" in tests
    names = tests | {"tests"} | {f"tests.{name}" for name in tests}
    for module, text in sources().items():
        assert not imports(module, text, names), module


RUN = """
import sys
sys.path.insert(0, {root!r})
from support import shapes
make = shapes.make
shapes.make = lambda n, seed: make(250, seed)  # instead of 12,000 images
import train
train.main(["--device", "cpu", "--steps", "1", "--out", {out!r}])
print("\\n".join(["MODULES", *sys.modules]))
"""


def test_a_default_run_loads_neither_fast_nor_zoo_nor_lab(tmp_path):
    """What is read is what runs: the default sizes stay below those at which fast/ is chosen.

    One step of the default run, with fewer images: only the search of k-NN depends on their number.
    """
    args = config.parse(["--device", "cpu"])
    assert args.eval_bank * args.eval_queries <= eval_knn.PLAIN_UP_TO
    code = RUN.format(root=ROOT, out=str(tmp_path / "out"))
    done = forked.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = done.stdout.split("MODULES\n")[1].split()
    ours = sources()
    lines = {module: len(ours[module].splitlines()) for module in loaded if module in ours}
    assert {"train", "gmm", "losses", "heads", "support.log"} <= lines.keys()
    # what only other sets of images need
    assert not {"support.groups", "support.folders", "support.named_sets"} & set(loaded)
    elsewhere = [name for name in lines if folder_of(name) not in ("root", "support")]
    assert not elsewhere, (f"python train.py loads {elsewhere}, among {len(lines)} modules of ours "
                           f"with {sum(lines.values())} lines")


# ---- lines, equations, names -------------------------------------------------------------------
@pytest.mark.parametrize("path", python_files(*FOLDERS, "tests"))
def test_lines_have_at_most_100_columns(path):
    too_long = [f"line {i}: {len(line)}" for i, line in enumerate(read(path).splitlines(), 1)
                if len(line) > 100]
    assert not too_long, f"{path}, {'; '.join(too_long)}"


@pytest.mark.parametrize("tag", ["A.1", "A.2", "A.3", "A.4", "A.5", "A.6", "A.7",
                                 "Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Def. 2.1"])
def test_every_equation_stands_in_the_code(tag):
    """Those of the appendix in gmm.py."""
    texts = [sources()["gmm"]] if tag.startswith("A.") else sources().values()
    assert any(re.search(rf"{re.escape(tag)}\b", text) for text in texts)


# what checks from outside call: (function, names of its parameters that they use)
PUBLIC = [
    (gmm.OnlineGMM, "K D forgetting resurrect rescale var_floor seed"),
    (gmm.OnlineGMM.set_params, "mu var pi mass"),
    (gmm.OnlineGMM.init_from, "h"),
    (gmm.OnlineGMM.responsibilities, "h beta"),
    (gmm.OnlineGMM.update, "h beta eta"),
    (gmm.eta_at, "t a c"),
    (losses.carp, "z_s z_t partition_size perm"),
    (losses.dino, "z_s p_t tau"),
    (losses.sinkhorn, "z tau iters"),
    (losses.koleo, "C"),
    (heads.vmf_log_normalizer, "kappa dim"),
    (collapse.unique_prototypes, "C eps"),
    (collapse.load_prototypes, "path key"),
    (eval_knn.knn_scores, "train_x train_y test_x k T num_classes"),
    (models.build, "arch patch_size img_size drop_path"),
    (train.main, "argv"),
]
DEFAULTS = [
    (gmm.OnlineGMM, dict(forgetting="responsibility", resurrect=0.3, rescale=True, seed=0)),
    (gmm.eta_at, dict(a=0.001, c=0.89)),
    (losses.carp, dict(perm=None)),
    (losses.dino, dict(tau=0.1)),
    (losses.sinkhorn, dict(iters=3)),
    (collapse.load_prototypes, dict(key=None)),
    (eval_knn.knn_scores, dict(k=20, T=0.07, num_classes=None)),
    (models.build, dict(patch_size=16, img_size=224, drop_path=0.0)),
    (train.main, dict(argv=None)),
]


@pytest.mark.parametrize("function, names", PUBLIC)
def test_public_names_have_their_parameters(function, names):
    """In this order; parameters of ours may follow, if they have defaults."""
    names = names.split()
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    assert [name for name in parameters if name in names] == names
    for name, parameter in parameters.items():
        assert name in names or parameter.default is not parameter.empty, name


@pytest.mark.parametrize("function, defaults", DEFAULTS)
def test_public_names_have_their_defaults(function, defaults):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in defaults} == defaults


# ---- commands and their flags ------------------------------------------------------------------
class Parsed(Exception):
    """Raised instead of going on after a command has read its flags."""


def parse(script, words, monkeypatch):
    """The parser that a script or module uses, after it has parsed `words` as its command line.

    script: "eval_knn.py" or "lab.bench". SystemExit if it refuses the words.
    """
    parse_args = argparse.ArgumentParser.parse_args

    def stop_after(parser, *args, **settings):
        parse_args(parser, *args, **settings)
        raise Parsed(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after)
        patch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Parsed) as stop:
            if script.endswith(".py"):
                runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
    return stop.value.args[0]


def tools():
    """Scripts of the root, and modules of zoo/ and lab/, that are commands; train.py aside."""
    commands = [path if folder_of(module_of(path)) == "root" else module_of(path)
                for path in python_files("", "zoo", "lab") if '"__main__"' in read(path)]
    return [command for command in commands if command != "train.py"]


# words without which a command refuses to run; those that are not here need none
NEEDED = {"collapse.py": ["RUN"], "eval_knn.py": ["RUN"], "eval_linear.py": ["RUN"],
          "lab.ablate": ["main"], "lab.eval_dense": ["RUN"]}


def flags_of(parser):
    return [action for action in parser._actions if action.dest != "help"]


def is_read(name, texts):
    return any(re.search(rf"\b(args|flags|options)\.{name}\b", text) for text in texts)


def test_every_flag_of_train_has_a_help_text_and_is_read():
    """To check that a value can be is not to read it."""
    texts = sources()
    check = inspect.getsource(rules.check)
    assert check in texts["support.rules"]
    texts["support.rules"] = texts["support.rules"].replace(check, "")
    for action in flags_of(config.parser()):
        assert action.help, action.dest
        assert is_read(action.dest, texts.values()), f"nobody reads --{action.dest}"


@pytest.mark.parametrize("tool", tools())
def test_every_flag_of_a_tool_has_a_help_text(tool, monkeypatch):
    parser = parse(tool, NEEDED.get(tool, []), monkeypatch)
    for action in flags_of(parser):
        assert action.help, action.dest


@pytest.mark.parametrize("tool", ["collapse.py", "eval_knn.py", "eval_linear.py",
                                  "lab.eval_dense"])
def test_every_flag_of_an_evaluation_is_read(tool, monkeypatch):
    for action in flags_of(parse(tool, NEEDED[tool], monkeypatch)):
        assert is_read(action.dest, sources().values()), f"nobody reads --{action.dest}"


def bash_lines(text):
    """The commands of ```bash blocks. A line goes on in the next one where it ends in a backslash,
    or within double quotes."""
    lines = []
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            if lines and lines[-1].count('"') % 2:
                lines[-1] += "\n" + line
            else:
                lines.append(line)
    return lines


def inline_code(text):
    """What stands between single backticks outside of blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(lines):
    """[(script or module, its words)] of the lines that start our Python files."""
    started = []
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if not words or words[0] not in ("python", "torchrun"):
                continue
            words = words[1:]
            while words and words[0].startswith("--"):  # of torchrun
                words = words[1:]
            if words and words[0] == "-m":
                words = words[1:]
            if words and (words[0].endswith(".py") or words[0].startswith(("lab.", "zoo."))):
                started.append((words[0], words[1:]))
    return started


def test_commands_are_found_in_a_page():
    page = """
`python train.py --seed
S` in prose.
```bash
pip install x && python train.py --lr 0.1   # a remark
torchrun --nproc_per_node=8 train.py --data \\
    DIR
python -m lab.ablate main -- --steps 3
python -m pytest -q
python -c "
python train.py --no-command"
python eval_knn.py RUN
```
```
then python collapse.py
```
"""
    assert commands(bash_lines(page)) == [
        ("train.py", ["--lr", "0.1"]), ("train.py", ["--data", "DIR"]),
        ("lab.ablate", ["main", "--", "--steps", "3"]), ("eval_knn.py", ["RUN"])]
    assert commands(inline_code(page)) == [("train.py", ["--seed", "S"])]


def parse_command(script, words, monkeypatch):
    """Parse a command of a page. What follows -- goes to the runs: of train.py, or of --script."""
    if script == "train.py":
        config.parse(words)
        return
    parse(script, words, monkeypatch)
    if "--" in words:
        of_run = words[words.index("--script") + 1] if "--script" in words else "train.py"
        of_training(of_run)([*words[words.index("--") + 1:], "--device", "cpu"])


def of_training(script):
    """The function that parses the flags of train.py, of zoo/NAME.py or of zoo.NAME."""
    if script == "train.py":
        return config.parse
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse


def has_flags(script, words, monkeypatch):
    """AssertionError for a flag in `words` that the script does not know."""
    if script == "train.py":
        known = config.parser()._option_string_actions
    else:
        known = parse(script, NEEDED.get(script, []), monkeypatch)._option_string_actions
        if "--" in words:
            has_flags("train.py", words[words.index("--") + 1:], monkeypatch)
            words = words[:words.index("--")]
    for word in words:
        if word.startswith("--"):
            assert word in known, f"{script} has no flag {word}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_pages_parse(page, tmp_path, monkeypatch):
    """Commands in blocks parse. Those in prose may have words like SEED: their flags exist.

    docs/fork.md is about names and files that its reader adds: there, too, the flags exist.
    """
    monkeypatch.chdir(tmp_path)
    text = read(page)
    in_blocks, in_prose = commands(bash_lines(text)), commands(inline_code(text))
    if page == "docs/fork.md":
        in_prose = [(script, words) for script, words in in_prose + in_blocks
                    if script == "train.py" or script in tools()]
        in_blocks = []
    for script, words in in_blocks:
        try:
            parse_command(script, words, monkeypatch)
        except SystemExit:
            pytest.fail(f"{page}: {script} {' '.join(words)} is refused")
    for script, words in in_prose:
        has_flags(script, words, monkeypatch)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/fork.md"])
def test_no_two_trainings_of_a_page_have_one_folder(page):
    """Who types the commands of a page one after the other is not refused: a folder that holds a
    run needs --resume."""
    found = {}  # {folder: command lines; those of two hosts are one}
    for script, words in commands(bash_lines(read(page))):
        trains = script == "train.py" or script.startswith("zoo.")
        if trains and not {"--resume", "--export"} & set(words) and "$kind" not in words:
            out = of_training(script)([*words, "--device", "cpu"]).out
            found.setdefault(out, set()).add(shlex.join([script, *words]))
    assert all(len(lines) == 1 for lines in found.values()), found


def test_the_readme_shows_how_to_train_to_count_and_to_evaluate():
    scripts = {script for script, _ in commands(bash_lines(read("README.md")))}
    assert {"train.py", "collapse.py", "eval_knn.py"} <= scripts
