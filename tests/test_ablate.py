"""ablate.py: commands that train.py takes, files that are not done twice, means and deviations by hand."""
import os

import pytest
import torch
from torchvision.utils import save_image

from lab import ablate
import config

TINY = ["--device", "cpu", "--batch-size", "8", "--steps", "4", "--num-prototypes", "16", "--partition-size", "8", "--bottleneck-dim", "8",
        "--head-hidden", "16", "--local-crops", "1", "--eval-bank", "16", "--eval-queries", "8", "--eval-every", "2"]


@pytest.mark.parametrize("name", ablate.TABLES)
def test_every_row_of_every_table_is_a_command_of_train(name, capsys):
    ablate.main([name, "--dry-run", "--seeds", "0", "7", "--results", "nowhere"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 * len(ablate.TABLES[name][1]) and len(set(lines)) == len(lines)
    for line in lines:
        assert line.startswith("python train.py ")
    parsed = [config.parse([*flags, "--device", "cpu"]) for _, _, flags in ablate.runs(name, [0], [])]
    assert len({tuple(sorted((k, str(v)) for k, v in vars(a).items() if k != "out")) for a in parsed}) == len(parsed)  # rows differ
    assert any(a.prototypes == "frozen" for a in parsed)  # no table without the control


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of one row on 24 images in a folder; returns what calls it."""
    monkeypatch.setitem(ablate.TABLES, "main", ("a test", [("one", "--prototypes frozen")]))
    for split in ("train", "val"):
        for c in "ab":
            os.makedirs(tmp_path / "set" / split / c)
            for i in range(8):
                save_image(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)), tmp_path / "set" / split / c / f"{i}.png")
    return lambda *more, extra=(): ablate.main(["main", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *more,
                                                "--", *TINY, "--data", str(tmp_path / "set"), *extra])


def test_a_table_is_run_once_goes_on_and_shows(table, tmp_path, capfd, monkeypatch):
    results = table("--seeds", "0")
    assert len(results) == 1 and results[0]["steps"] == "4" and results[0]["drift"] == "0" and results[0]["torch"] == torch.__version__
    text = capfd.readouterr().out
    assert "| one | 1 |" in text and "step 4/4" in text and os.path.exists(tmp_path / "results" / "main.csv")

    real, calls = ablate.subprocess.run, []
    monkeypatch.setattr(ablate.subprocess, "run", lambda *a, **k: calls.append(a) or real(*a, **k))
    assert len(table("--seeds", "0")) == 1 and not calls  # what stands in the file is not repeated
    assert len(table("--seeds", "0", "1")) == 2 and len(calls) == 1
    assert "| one | 2 |" in capfd.readouterr().out

    # a folder with other flags than its command has is refused: its row would name what did not run
    monkeypatch.setitem(ablate.TABLES, "main", ("a test", [("one", "--prototypes joint")]))
    os.rename(tmp_path / "results" / "main.csv", tmp_path / "kept.csv")
    with pytest.raises(SystemExit):
        table("--seeds", "0")
    assert "holds a run with other flags (--prototypes frozen -> joint); move it away" in capfd.readouterr().err
    monkeypatch.setitem(ablate.TABLES, "main", ("a test", [("one", "--prototypes frozen")]))
    os.rename(tmp_path / "kept.csv", tmp_path / "results" / "main.csv")

    # a run that was stopped in the middle goes on: the file lost its row, the folder has a checkpoint of step 2
    stopped = next(p for p in (tmp_path / "runs" / "main").iterdir() if p.name.endswith("s0"))
    before = ablate.read(tmp_path / "results" / "main.csv")[0]
    os.remove(tmp_path / "results" / "main.csv")
    for f in stopped.iterdir():
        os.remove(f)
    assert real([ablate.sys.executable, "train.py", "--prototypes", "frozen", *TINY, "--data", str(tmp_path / "set"), "--seed", "0", "--out",
                 str(stopped), "--stop-at", "2"], cwd=HERE).returncode == 0
    after = table("--seeds", "0")[0]
    assert "at step 2" in capfd.readouterr().out
    assert {k: after[k] for k in ("knn", "used", "perplexity", "unique_0.5", "raw_knn", "untrained_knn")} == \
           {k: before[k] for k in ("knn", "used", "perplexity", "unique_0.5", "raw_knn", "untrained_knn")}


def result(row, seed, knn, block=""):
    return dict.fromkeys(ablate.FIELDS, "0.5") | {"row": row, "seed": str(seed), "knn": str(knn), "block": block, "raw_knn": "40",
                                                  "untrained_knn": "30", "steps": "10", "hardware": "a machine", "torch": "2", "date": "d"}


def test_mean_and_deviation_by_hand_and_blocks_apart(tmp_path):
    first, second = (row for row, _ in ablate.TABLES["A2"][1][:2])
    file = str(tmp_path / "A2.csv")
    for r in (result(second, 0, 60), result(first, 0, 50), result(first, 1, 54), result(first, 2, 55), result(first, 0, 20, "--steps 3")):
        ablate.add(file, r)
    text = ablate.table("A2", ablate.read(file))
    assert f"| {first} | 3 | 53.0 ± 2.6 | 0.500 ± 0.000 |" in text and f"| {second} | 1 | 60.0 | 0.500 |" in text
    assert text.index(first) < text.index(second) and f"| {first} | 1 | 20.0 |" in text and "`python ablate.py A2 -- --steps 3`" in text
    assert len(ablate.main(["A2", "--show", "--results", str(tmp_path)])) == 5
    assert (tmp_path / "A2.png").stat().st_size > 1000 or not pytest.importorskip("matplotlib")


@pytest.mark.parametrize("argv, words", [
    (["main", "--show", "--results", "nowhere"], "nowhere/main.csv holds no results yet"), (["main", "--", "--seed", "3"], "--seeds"),
    (["A1", "--rows", "nope"], "--rows 'nope' is not a row of A1; there are: no responsibility forgetting")])
def test_bad_input_is_one_sentence_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        ablate.main(argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_that_fails_is_named(table, capfd):
    with pytest.raises(SystemExit):
        table("--seeds", "0", extra=("--lr", "-1"))
    assert "one, seed 0: train.py ended with exit code 2" in capfd.readouterr().err


HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEPT = [n[:-4] for n in sorted(os.listdir(os.path.join(HERE, "results"))) if n.endswith(".csv")] if os.path.isdir(os.path.join(HERE, "results")) else []


@pytest.mark.parametrize("name", KEPT)
def test_every_kept_table_stands_in_the_readme_as_it_is_printed(name):
    """No number of a table is typed by hand; and every row of the file is one that its command makes."""
    text, results = open(os.path.join(HERE, "README.md")).read(), ablate.read(os.path.join(HERE, "results", f"{name}.csv"))
    for line in ablate.table(name, results).splitlines():
        assert line in text, line
    assert any("frozen" in r["row"] for r in results) and all(r["command"].startswith("train.py ") and r["date"] and r["torch"] for r in results)
