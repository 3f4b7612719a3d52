"""The diffs of docs/fork.md and README.md, applied to a copy of the code, do what they promise."""
import csv
import json
import os
import re
import shutil
import sys

import pytest

import forked

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What a forker does after applying the diffs; one process, since starting torch takes seconds.
DRIVER = """
import collapse, config, eval_knn, train, zoo.mine
few = ("--device cpu --data noise --batch-size 8 --steps 4 --num-prototypes 16 --partition-size 8 "
       "--bottleneck-dim 8 --head-hidden 16 --local-crops 1 --eval-bank 24 --eval-queries 8 "
       "--log-every 1 --gmm-start 1").split()
train.main([*few, "--out", "plain"])
train.main([*few, "--out", "other-data", "--data", "folder"])
train.main([*few, "--out", "loss", "--method", "spread"])
train.main([*few, "--out", "parts", "--method", "spread", "--stop-at", "2"])
train.main(["--out", "parts", "--resume", "--device", "cpu"])
train.main([*few, "--out", "frozen", "--prototypes", "frozen"])
train.main([*few, "--out", "set", "--prototypes", "recent"])
zoo.mine.main([*few, "--out", "script"])
for out in ("loss", "set", "script"):
    eval_knn.main([out, "--k", "5"])
    assert collapse.main([out]) == 0
assert collapse.main(["script", "--data", "noise"]) == 0
open("help", "w").write(config.parser().format_help())
"""


def diffs(page):
    """{file: diff} of the ```diff blocks of a page."""
    with open(os.path.join(ROOT, page)) as f:
        blocks = re.findall(r"```diff\n(.*?)```", f.read(), re.S)
    return {re.search(r"^\+\+\+ b/(\S+)", block, re.M)[1]: block for block in blocks}


def apply(diff, path):
    """Apply the hunks of a unified diff: where their old lines stand, once, put their new lines."""
    with open(path) as f:
        text = f.read()
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines()
        old = "".join(line[1:] + "\n" for line in lines if line[:1] in (" ", "-", ""))
        new = "".join(line[1:] + "\n" for line in lines if line[:1] in (" ", "+", ""))
        assert text.count(old) == 1, f"{path} does not hold these lines once:\n{old}"
        text = text.replace(old, new)
    with open(path, "w") as f:
        f.write(text)


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the code with all diffs of docs/fork.md applied, after the runs of DRIVER."""
    fork = tmp_path_factory.mktemp("fork")
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), fork)
    for name in ("fast", "support", "zoo"):
        shutil.copytree(os.path.join(ROOT, name), fork / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(fork / "train.py", fork / "zoo" / "mine.py")
    for path, diff in diffs("docs/fork.md").items():
        apply(diff, fork / path)

    from PIL import Image
    for i in range(16):
        folder = fork / "folder" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (10 * i, 90, 200)).save(folder / f"{i}.png")

    (fork / "driver.py").write_text(DRIVER)
    done = forked.run([sys.executable, "driver.py"], cwd=fork, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return fork


def steps(fork, out):
    """The rows of a run's log that belong to steps."""
    with open(fork / out / "log.csv", newline="") as f:
        return list(csv.DictReader(f))[1:]


def losses(fork, out):
    return [row["loss"] for row in steps(fork, out)]


def test_a_loss_with_a_new_term(fork):
    """The term is logged and summed, the run differs, and a resumed run goes on with its column."""
    rows = steps(fork, "loss")
    for row in rows:
        terms = [float(row[name]) for name in ("consistency", "entropy", "spread")]
        assert terms[2] > 0 and float(row["loss"]) == pytest.approx(sum(terms), rel=1e-4)
    plain = steps(fork, "plain")
    assert "spread" not in plain[0]
    assert rows[0]["consistency"] == plain[0]["consistency"]  # the first step has moved nothing yet
    # the term has a gradient
    assert [r["consistency"] for r in rows[1:]] != [r["consistency"] for r in plain[1:]]
    assert [row["spread"] for row in steps(fork, "parts")] == [row["spread"] for row in rows]


def test_a_prototype_set(fork):
    assert losses(fork, "set") != losses(fork, "frozen")
    row = steps(fork, "set")[-1]
    assert float(row["typical_length"]) > 0 and float(row["drift"]) > 0


def test_an_image_set(fork):
    assert losses(fork, "plain") != losses(fork, "other-data")
    assert json.loads((fork / "plain" / "args.json").read_text())["data"] == "noise"


def test_the_choices_of_help_follow_from_the_tables(fork):
    text = (fork / "help").read_text()
    assert re.search(r"--method \{spread,carp", text)
    assert re.search(r"--prototypes\s+\{recent,joint", text)
    assert "noise, shapes" in text


def test_a_copied_script_names_itself(fork):
    """It trains as train.py does; the tools of DRIVER have evaluated and counted it."""
    assert losses(fork, "script") == losses(fork, "plain")
    assert json.loads((fork / "script" / "args.json").read_text())["script"] == "zoo/mine.py"


def test_the_diff_of_the_readme_is_one_of_these():
    pages, shown = diffs("docs/fork.md"), diffs("README.md")
    assert shown
    for path, diff in shown.items():
        assert diff == pages[path] and len(diff.splitlines()) <= 15
