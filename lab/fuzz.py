"""Call the tools with random flags and on damaged files, and see that each error is a sentence.

    python -m lab.fuzz                      200 command lines and 200 damaged files, some minutes
    python -m lab.fuzz --only 17            one case of them again, with all that it prints

Start it in the folder of train.py, on Linux. TOOLS lists the tools. An even case is a command line,
drawn from the tool's own parser with good, odd and broken values. An odd case is a usual command on
a copy of a small run's folder, with one of its files damaged. A case runs in a fork of this
process, which has imported torch already, in a folder of its own. It fails if it prints a
traceback, if its exit code is not 0 or 2 (or 1, of collapse.py --fail-below), if it says no
sentence beside exit code 2, if it takes too long, or if it ends with an error and a file that was
there is lost or changed. In some cases no file may grow beyond 100 to 100,000 bytes, as on a full
disk, or the terminal knows ASCII alone.
"""
import argparse
import collections
import contextlib
import datetime
import importlib.util
import io
import json
import os
import platform
import random
import re
import resource
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass

import numpy as np
import torch

import collapse
import config
import eval_knn
import eval_linear
import train
from lab import ablate, bench, chaos, contestants, tables, tabulate
from lab.machine import cpu
from support.errors import one_sentence
from support.flags import check_values

LIMIT = 60  # seconds of a case; nearly all take one or two
MEMORY = 2 ** 33  # bytes of address space that a case may take beyond what this process has
TINY = ["--device", "cpu", "--batch-size", "8", "--steps", "4", "--num-prototypes", "16",
        "--partition-size", "8", "--bottleneck-dim", "8", "--head-hidden", "16",
        "--local-crops", "1", "--eval-bank", "16", "--eval-queries", "8", "--eval-every", "2",
        "--gmm-start", "1"]
SMALL_BENCH = [word for name in bench.SIZES for word in (f"--{name}", "32")]

# tool: (main, parser, its usual command lines by name). Each is tiny; what they read is made by
# make_template
TOOLS = {
    "train.py": (train.main, config.parser, {
        "decoupled": [*TINY, "--data", "images"],
        "joint": [*TINY, "--data", "images", "--prototypes", "joint"],
        "live": [*TINY, "--data", "images", "--method", "dino", "--prototypes", "live"],
        "init": [*TINY, "--data", "images", "--init", "run/ckpt.pt"],
        "resume": ["--out", "run", "--resume", "--device", "cpu"],
        "export": ["--out", "run", "--export", "exported.pt"]}),
    "eval_knn.py": (eval_knn.main, eval_knn.parser, {
        "run": ["run", "--device", "cpu"],
        "dump": ["run", "--leave-one-out", "--dump", "f.pt"],
        "of others": ["backbone.pt", "--arch", "vit_nano", "--data", "images"]}),
    "eval_linear.py": (eval_linear.main, eval_linear.parser, {
        "lbfgs": ["run"],
        "grid": ["run", "--protocol", "grid", "--steps", "3", "--layers", "2"],
        "sgd": ["run", "--protocol", "sgd", "--epochs", "1"]}),
    "collapse.py": (collapse.main, collapse.parser, {
        "run": ["run"],
        "images": ["run", "--data", "images", "--assign", "a.csv", "--montage", "m.png"],
        "files": ["run", "--plot", "p.png", "--json", "o.json", "--csv", "o.csv"],
        "arrays": ["C.npy", "C.npz", "C.safetensors", "C.pt", "--fail-below", "0.5"]}),
    "lab.ablate": (ablate.main, ablate.parser, {
        "show": ["A2", "--show", "--results", "."],
        "dry run": ["A2", "--dry-run", "--results", "."]}),
    "lab.bench": (bench.main, bench.parser, {
        item: [item, "--reps", "1", *SMALL_BENCH] for item in ("gmm", "loss", "unique", "knn")}),
    "lab.chaos": (chaos.main, chaos.parser, {
        "one kill": ["--kills", "1", "--steps", "2", "--longest", "0.1"]}),
}
# (what a value must be, test, flags)
RANGES = [("not be negative", lambda v: v >= 0, ["seed", "only"]),
          ("be at least 1", lambda v: v >= 1, ["cases"])]
# a file of the template: tools and their usual commands that read it
READERS = {
    "run/ckpt.pt": [("train.py", "init"), ("train.py", "resume"), ("train.py", "export"),
                    ("eval_knn.py", "run"), ("eval_linear.py", "lbfgs"), ("collapse.py", "run"),
                    ("collapse.py", "images")],
    "run/args.json": [("train.py", "resume")],
    "run/log.csv": [("train.py", "resume"), ("collapse.py", "run"), ("collapse.py", "files")],
    "run/results.csv": [("eval_knn.py", "run"), ("eval_linear.py", "lbfgs"),
                        ("train.py", "resume")],
    "run/lock": [("train.py", "resume")],
    "images/train/a/1.png": [("train.py", "decoupled"), ("eval_knn.py", "run"),
                             ("eval_linear.py", "sgd"), ("collapse.py", "images")],
    "backbone.pt": [("eval_knn.py", "of others")],
    "C.npy": [("collapse.py", "arrays")], "C.npz": [("collapse.py", "arrays")],
    "C.safetensors": [("collapse.py", "arrays")], "C.pt": [("collapse.py", "arrays")],
    "A2.csv": [("lab.ablate", "show"), ("lab.ablate", "dry run")],
}

HAS_SAFETENSORS = importlib.util.find_spec("safetensors") is not None  # else it is not written

# values for flags. GOOD: good values of flags whose form does not follow from their type, or whose
# other good values take long
NUMBERS = ["nan", "inf", "-inf", "-1", "0", "-0", "1e400", "1e-300", "1e9", "9" * 20, "9" * 400,
           "4294967295", "4294967296", "1_0", "0x10", "\N{SUPERSCRIPT TWO}", "1.5", "", " ", "x"]
PATHS = ["", " ", ".", "images", "run", "run/ckpt.pt", "C.npy", "C.npy/below", "nowhere",
         "nowhere/below", "/dev/full", "/dev/null", "n" * 300, "new.pt", "new.csv", "new.png",
         "new.safetensors", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", os.fsdecode(b"caf\xe9"),
         os.fsdecode(b"caf\xe9.png"), "-", "shape"]
GOOD = {"workers": ["0", "1"], "arch": ["vit_nano", "vit_tiny", "resnet18"],
        "preset": ["tiny", "cifar10-cpu"], "device": ["cpu", "cpu:0", "auto", "cuda", "mps"],
        "eps": ["0.1", "0,2", "0.025,0.5,1"], "panels": ["knn", "used"], "seeds": ["0", "3"],
        "kills": ["0", "1"], "longest": ["0.1"], "reps": ["1"], "bank": ["20", "40"],
        "protocol": ["lbfgs"]}
COSTLY = {"compile", "paper", "step_flags"}  # flags that are never drawn
SIZES = {"num_prototypes", "bottleneck_dim", "head_hidden", "img_size", "local_size", "layers",
         "K", "D", "N", "V", "B", "P", "unique", "queries", "batch"}  # flags without huge values


@dataclass
class Case:
    """One call of a tool, a function of (seed, number)."""
    number: int
    tool: str
    words: list
    damaged_file: str = ""  # it is damaged before the tool is called
    seed: int = 0  # of the damage
    encoding: str = "utf-8"
    largest_file: int = 0  # bytes; 0: no limit

    def __str__(self):
        text = shlex.join([self.tool, *self.words])
        if self.damaged_file:
            text += f", {self.damaged_file} being damaged"
        if self.largest_file:
            text += f", no file beyond {self.largest_file} bytes"
        return text + (", on an ASCII terminal" if self.encoding == "ascii" else "")


# ---- what is called ----------------------------------------------------------------------------
def draw_case(seed, number):
    """The case of this number: a random command line if it is even, else a damaged file."""
    rng = random.Random(f"{seed} {number}")
    if number % 2:
        damaged_file, tool, name = rng.choice(
            [(path, *reader) for path in READERS for reader in READERS[path]
             if path != "C.safetensors" or HAS_SAFETENSORS])
        words = TOOLS[tool][2][name]
    else:
        tool, damaged_file = rng.choice([*TOOLS, "train.py", "train.py", "eval_linear.py"]), ""
        words = draw_words(rng, tool)
    largest_file = rng.choice([0, 100, 3000, 10 ** 5]) if rng.random() < 0.15 else 0
    encoding = "ascii" if rng.random() < 0.2 else "utf-8"
    return Case(number, tool, words, damaged_file, rng.getrandbits(32), encoding, largest_file)


def draw_words(rng, tool):
    """A usual command line with one to three random flags behind it."""
    _, parser, usual = TOOLS[tool]
    words = list(rng.choice(list(usual.values())))
    actions = [a for a in parser()._actions if a.option_strings and a.dest not in COSTLY]
    for action in rng.sample(actions, rng.randint(1, 3)):
        words.append(rng.choice(action.option_strings))
        if action.nargs != 0:
            several = action.nargs if isinstance(action.nargs, int) else 1
            if action.nargs == "+":
                several = rng.randint(1, 3)
            if rng.random() < 0.05:
                several = rng.choice([0, 1, 2, 5])
            words += [draw_value(rng, action) for _ in range(several)]
    if tool == "train.py":
        if rng.random() < 0.9 or "--stop-at" not in words:
            words += ["--stop-at", "3"]  # no long training, whatever --steps is
    if tool == "lab.chaos" and {"4294967295", "1e9", "1_0"} & set(words):
        # such values are allowed, and take long: kills are tried until one meets a running process
        words += ["--steps", "2", "--longest", "0.1"]
    return words


def draw_value(rng, action):
    """A value for a flag, an argparse action: one that may be, one of the right type, or any."""
    way = rng.choice(["good", "good", "good", "type", "type", "any"])
    if way == "good":
        if action.dest in GOOD:
            return rng.choice(GOOD[action.dest])
        if action.choices:
            return rng.choice(list(action.choices))
        if action.type is int:
            return str(rng.choice([1, 2, 4, 8, 16, 32]))
        if action.type is float:
            return rng.choice(["0.1", "0.25", "0.5", "1", "2"])
        return rng.choice(PATHS)
    values = NUMBERS + PATHS * (action.type is None)
    if way == "type":
        values = [value for value in values if has_type(value, action.type)]
    value = rng.choice(values)
    if value == "4294967295" and action.dest in SIZES:
        return "-1"  # so large a size would only run out of memory
    return value


def has_type(value, kind):
    """Whether a word can be read as `kind`, int or float; None: as any text can."""
    try:
        (kind or str)(value)
    except ValueError:
        return False
    return True


# ---- what it is called on ----------------------------------------------------------------------
def make_template():
    """Fill the current folder with images, a run of 2 steps of 4 and other files that tools read.
    """
    for split in ("train", "val"):
        chaos.make_images(os.path.join("images", split), 16)
    train.main([*TINY, "--data", "images", "--out", "run", "--save-every", "1", "--stop-at", "2"])
    train.main(["--out", "run", "--export", "backbone.pt"])
    eval_knn.main(["run", "--device", "cpu"])
    C = collapse.load_prototypes("run")["prototypes"]  # (K, D)
    np.save("C.npy", C.numpy())
    np.savez("C.npz", a=C.numpy(), b=2 * C.numpy())
    torch.save({"state_dict": {"prototypes.weight": C}}, "C.pt")
    with contextlib.suppress(ImportError):
        from safetensors.torch import save_file
        save_file({"prototypes.weight": C}, "C.safetensors")
    for seed in range(2):
        for row, _ in tables.TABLES["A2"][1]:
            result = dict.fromkeys(tables.FIELDS, "0.5") | {"row": row, "seed": seed, "block": ""}
            tabulate.add("A2.csv", tabulate.read_results("A2", "A2.csv"), result)


def damage(path, seed):
    """Damage a file: flip, cut, zero or replace its bytes, swap it for another file of its folder,
    alter what a .pt, .json or .csv file holds, or begin another kind of file in its middle."""
    rng = random.Random(seed)
    if path.endswith("lock"):
        with open(path, "w") as f:
            f.write(rng.choice(["", "x", "[]", "{}", "null", '{"pid": "x"}', "\x00", '{"pid": 1}',
                                json.dumps({"host": platform.node(), "pid": rng.choice(
                                    [0, -1, 1.5, "x", None, 10 ** 30, 2 ** 22])})]))
        return
    with open(path, "rb") as f:
        old = bytearray(f.read())
    way = rng.choice(["flip", "cut", "zero", "replace", "swap", "alter", "alter"])
    begin = rng.randrange(len(old))
    if way == "flip":
        for _ in range(rng.choice([1, 3, 30])):
            old[rng.randrange(len(old))] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del old[begin:]
    elif way == "zero":
        end = min(len(old), begin + rng.choice([1, 10, 10 ** 4]))
        old[begin:end] = bytes(end - begin)
    elif way == "replace":
        old = rng.choice([b"", b"\n", b"text", b"<html>", b"[]", b"{}", b"null", b"a,b\n1,2\n",
                          b"PK\x03\x04", b"\x80\x02.", b"\xff\xfe" * 9, rng.randbytes(999)])
    elif way == "swap":
        with open(rng.choice(files_beside(path)), "rb") as f:
            old = f.read()
    elif path.endswith(".pt"):
        stored = torch.load(path, weights_only=True)
        alter(stored["args"] if "args" in stored and rng.random() < 0.5 else stored, rng)
        torch.save(stored, path)
        return
    elif path.endswith(".json"):
        stored = json.loads(old)
        alter(stored, rng)
        old = json.dumps(stored, default=str).encode()
    elif path.endswith(".csv"):
        words = re.split(r"([\w.]+)", old.decode())
        place = rng.randrange(1, len(words), 2)
        words[place] = rng.choice(["nan", "x", "-1", "1e999", "", "null", '"', "\n", ",", "[1]",
                                   "true", "\N{SUPERSCRIPT TWO}", "9" * 400, "\x00"])
        old = "".join(words).encode()
    else:
        old = old[begin:] + old[:begin]
    with open(path, "wb") as f:
        f.write(old)


def files_beside(path):
    """Other files in the folder of a file, in order; the folder holds at least two."""
    folder = os.path.dirname(path)
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    return [p for p in paths if os.path.isfile(p) and p != path]


def alter(tree, rng):
    """Replace or remove one value somewhere in a nested dict or list, in place."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = rng.choice(keys)
    value = tree[key]
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        return alter(value, rng)
    if rng.random() < 0.2:
        del tree[key]
    elif torch.is_tensor(value) and rng.random() < 0.8:
        tree[key] = rng.choice([value * torch.nan, value[:0] if value.dim() else value[None],
                                value.to(torch.int64), value.double(), value[None], value.bool()])
    else:
        tree[key] = rng.choice([None, "x", -1, 1.5, 10 ** 30, float("nan"), [], {}, True,
                                torch.zeros(2), torch.zeros(0), [value], {"x": value}])


# ---- one case in a process of its own ----------------------------------------------------------
def run_in_fork(work, encoding="utf-8"):
    """(exit code, output) of work() in a fork; the code is negative for a signal, None for a hang.

    What work returns is the exit code, where it is a number. encoding: of the terminal.
    """
    sys.stdout.flush()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        code = 99
        try:
            os.setsid()  # so that the parent can end whatever it starts
            for name, errors in ("stdout", "strict"), ("stderr", "backslashreplace"):
                stream = io.TextIOWrapper(open(os.dup(write_end), "wb"), encoding, errors)
                setattr(sys, name, stream)
            os.dup2(write_end, 1)
            os.dup2(write_end, 2)
            code = work()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 0)  # what follows is its parent's work
    os.close(write_end)
    output, end = b"", time.monotonic() + LIMIT
    while True:
        left = end - time.monotonic()
        if left <= 0 or not select.select([read_end], [], [], left)[0]:
            os.killpg(pid, signal.SIGKILL)
            break
        part = os.read(read_end, 2 ** 16)
        if not part:
            break
        output += part
    os.close(read_end)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if time.monotonic() > end else code, output.decode(errors="replace")


def call(case, folder):
    """Call the tool of a case in this folder. Returns its exit code."""
    os.chdir(folder)
    sys.argv = [case.tool]
    bench.race = race_without_processes
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    if case.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.largest_file, case.largest_file))
    code = TOOLS[case.tool][0](case.words)
    return code if case.tool == "collapse.py" else 0


def race_without_processes(item, ways, options, reps=None):
    """bench.race without a process for each contestant, which would have to import torch."""
    for way in ways:
        getattr(contestants, item)(way, options)()
    return {way: ([1.0], 1.0) for way in ways}


def contents(folder):
    """{path: bytes} of all files below a folder."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(place, name), "rb") as f:
                found[os.path.relpath(f.name, folder)] = f.read()
    return found


def lost_files(before, after):
    """Paths of files whose content is nowhere any more. More at its end, as a log has, is fine."""
    kept = set(after.values())
    return [path for path, content in before.items()
            if content not in kept and not after.get(path, b"").startswith(content)]


def what_is_wrong(case, code, output, before, after):
    """A word for what a case did wrong, "" for nothing."""
    if code is None:
        return f"did not end within {LIMIT} s"
    if "Traceback (most" in output:
        return "traceback"
    if "codec can't" in output:
        return "does not say which text cannot be encoded"
    if code < 0 or code not in (0, 2) and not (code == 1 and case.tool == "collapse.py"):
        return f"exit code {code}"
    last = (output.strip().splitlines() or [""])[-1]
    if code == 2 and not re.search(r"error( \(process \d+\))?: \S", last):
        return "exit code 2 without a sentence"
    lost = lost_files(before, after) if code == 2 else []
    if "resumed run/ckpt" in output:  # a run that went on drops rows of its log, for instance
        lost = [path for path in lost if path not in ("run/log.csv", "run/args.json")]
    return f"{', '.join(lost)} lost or changed" if lost else ""


def run_case(case, template):
    """(what is wrong or "", output) of a case, in a copy of the folder `template`."""
    with tempfile.TemporaryDirectory() as base:
        folder = os.path.join(base, "case")
        shutil.copytree(template, folder)
        if case.damaged_file:
            code, output = run_in_fork(lambda: damage(os.path.join(folder, case.damaged_file),
                                                      case.seed))
            if code != 0:
                return f"{case.damaged_file} could not be damaged", output
        before = contents(folder)
        code, output = run_in_fork(lambda: call(case, folder), case.encoding)
        return what_is_wrong(case, code, output, before, contents(folder)), output


# ---- all cases ---------------------------------------------------------------------------------
def load_what_tools_load():
    """Import, once for all forks, what the tools import inside functions."""
    import fast.gmm
    import fast.knn
    import fast.losses
    import fast.unique
    import support.assign
    import support.export
    import support.plots
    import zoo.live  # noqa: F401
    with contextlib.suppress(ImportError):
        import matplotlib.figure
        import matplotlib.backends.backend_agg
        import safetensors.torch  # noqa: F401


def experiment(args):
    """All cases, or the one that args name. -> ({tool: cases}, [sentence about a failure])"""
    torch.set_num_threads(1)  # before the forks: a fork has none of its parent's threads
    load_what_tools_load()
    numbers = range(2 * args.cases) if args.only is None else [args.only]
    counts, failures = collections.Counter(), []
    with tempfile.TemporaryDirectory() as base:
        def template():
            os.chdir(base)
            make_template()
        code, output = run_in_fork(template)
        if code != 0:  # None: it did not end in time
            raise ValueError(f"the run that all cases start from failed: {output[-2000:]}")
        for number in numbers:
            case = draw_case(args.seed, number)
            wrong, output = run_case(case, base)
            counts[case.tool] += 1
            if wrong:
                failures.append(f"case {number}: {wrong}: {case}")
                print(failures[-1], flush=True)
            if args.only is not None:
                print(f"{case}\n{output}")
    return counts, failures


def parser():
    p = argparse.ArgumentParser("python -m lab.fuzz", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=200,
                   help="command lines, and as many damaged files; 200 by default")
    p.add_argument("--seed", type=int, default=0, help="of the cases; 0 by default")
    p.add_argument("--only", type=int, metavar="N", help="this case alone, with its output")
    return p


def main(argv=None):
    """Exit code 0 if all cases passed, 1 if not. Bad input: one sentence and exit code 2."""
    args = parser().parse_args(argv)
    begin = time.perf_counter()
    with one_sentence("lab.fuzz"):
        check_values(args, RANGES)
        counts, failures = experiment(args)
    tools = ", ".join(f"{tool} {n}" for tool, n in sorted(counts.items()))
    print(f"{counts.total() - len(failures)} of {counts.total()} cases of seed {args.seed} ended "
          f"as they should ({tools}), {len(failures)} failures. {datetime.date.today()}, "
          f"{cpu()}, torch {torch.__version__}, {time.perf_counter() - begin:.0f} s")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
