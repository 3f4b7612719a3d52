"""lab/ablate.py: commands that the scripts take, runs that are not done twice, and means and
deviations by hand."""
import glob
import importlib
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torchvision.utils import save_image

import config
import forked
from lab import ablate, tables, tabulate
from support import shapes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--device", "cpu", "--batch-size", "8", "--steps", "4", "--num-prototypes", "16",
        "--partition-size", "8", "--bottleneck-dim", "8", "--head-hidden", "16",
        "--local-crops", "1", "--eval-bank", "16", "--eval-queries", "8", "--eval-every", "2"]
FROZEN = ("a test", [("one", "--prototypes frozen")])
MEASURED = ("knn", "used", "perplexity", "unique_0.5", "raw_knn", "untrained_knn")


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    monkeypatch.setattr(ablate, "subprocess", SimpleNamespace(run=forked.run))


# ---- commands ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", tables.TABLES)
def test_every_row_of_every_table_is_a_command_of_train(name, capsys):
    ablate.main([name, "--dry-run", "--seeds", "0", "7", "--results", "nowhere"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 * len(tables.TABLES[name][1])
    assert len(set(lines)) == len(lines)
    assert all(line.startswith(("python train.py ", "python -m zoo.")) for line in lines)

    distinct, frozen = set(), False
    runs = ablate.runs(name, [0], [])
    for run in runs:
        script = config
        if run.script != "train.py":
            script = importlib.import_module(ablate.module_of(run.script))
        args = vars(script.parse([*run.flags, "--device", "cpu"]))
        frozen |= "frozen" in (args["prototypes"], args.get("patch_prototypes"))
        args.pop("out")
        distinct.add(json.dumps(args, sort_keys=True))
    assert len(distinct) == len(runs)  # no two rows are the same run
    assert frozen  # no table without the control


def test_commands_that_cannot_run_are_not_printed(capsys):
    with pytest.raises(SystemExit) as refusal:
        ablate.main(["main", "--dry-run", "--results", "nowhere", "--", "--bogus", "3"])
    assert refusal.value.code == 2
    assert "--bogus" in capsys.readouterr().err


def test_runs_lie_in_the_folder_from_which_the_table_was_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ablate.main(["main", "--dry-run", "--seeds", "0", "--rows", "CARP, joint"])
    assert f"--out {tmp_path}/runs/main/CARP-joint-s0" in capsys.readouterr().out


def test_a_row_can_name_a_script_of_the_zoo(monkeypatch, capsys):
    monkeypatch.setitem(tables.TABLES, "main", ("a test", [
        ("one", "--lr 1"), ("two", "zoo/msn.py --lr 2"), ("three", "zoo/capi.py")]))
    one, two, three = ablate.runs("main", [5], ["--steps", "9"])
    assert (one.script, one.flags) == ("train.py", "--lr 1 --steps 9 --seed 5".split())
    assert (two.script, two.flags) == ("zoo/msn.py", "--lr 2 --steps 9 --seed 5".split())
    assert (three.script, three.flags) == ("zoo/capi.py", "--steps 9 --seed 5".split())
    ablate.main(["main", "--dry-run", "--seeds", "5", "--results", "nowhere"])
    assert capsys.readouterr().out.splitlines() == [
        "python train.py --lr 1 --seed 5 --out runs/main/one-s5",
        "python -m zoo.msn --lr 2 --seed 5 --out runs/main/two-s5",
        "python -m zoo.capi --seed 5 --out runs/main/three-s5"]


# ---- runs --------------------------------------------------------------------------------------
def make_images(folder):
    """8 images of each of two classes, in a training and a test split."""
    for split in ("train", "val"):
        for c in "ab":
            os.makedirs(folder / split / c)
            for i in range(8):
                x = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i))
                save_image(x, folder / split / c / f"{i}.png")
    return str(folder)


@pytest.fixture
def ablate_main(tmp_path, monkeypatch):
    """Runs the table "main", which has one row here, with --seeds and more flags for train.py."""
    monkeypatch.setitem(tables.TABLES, "main", FROZEN)
    folder = make_images(tmp_path / "set")

    def call(*seeds, extra=()):
        return ablate.main(["main", "--runs", str(tmp_path / "runs"),
                            "--results", str(tmp_path / "results"), "--seeds", *seeds,
                            "--", *TINY, "--data", folder, *extra])
    return call


def test_a_table_is_run_once_and_shown(ablate_main, tmp_path, capfd, monkeypatch):
    results = ablate_main("0")
    assert len(results) == 1
    assert (results[0]["steps"], results[0]["drift"]) == ("4", "0")
    assert results[0]["torch"] == torch.__version__
    assert results[0]["command"].startswith("train.py --prototypes frozen --device cpu ")
    text = capfd.readouterr().out
    assert "| one | 1 |" in text and "step 4/4" in text

    calls = []
    monkeypatch.setattr(ablate.subprocess, "run",
                        lambda *a, **k: calls.append(a) or forked.run(*a, **k))
    assert len(ablate_main("0")) == 1 and not calls  # what stands in the file is not repeated
    assert len(ablate_main("0", "1")) == 2 and len(calls) == 1
    assert "| one | 2 |" in capfd.readouterr().out


def test_a_run_that_was_stopped_goes_on(ablate_main, tmp_path, capfd):
    whole = ablate_main("0")[0]
    out, = (tmp_path / "runs" / "main").iterdir()
    os.remove(tmp_path / "results" / "main.csv")
    shutil.rmtree(out)
    command = [sys.executable, "train.py", "--prototypes", "frozen", *TINY,
               "--data", str(tmp_path / "set"), "--seed", "0", "--out", str(out)]
    forked.run([*command, "--stop-at", "2"], cwd=ROOT, check=True)
    resumed = ablate_main("0")[0]
    assert "at step 2" in capfd.readouterr().out
    for column in MEASURED:
        assert resumed[column] == whole[column], column


@pytest.mark.parametrize("measure, file, head", [
    ("accuracy_of_groups", "results.csv", "result,head,medium,tail"),
    ("segmentation", "results_dense.csv", "result,miou"),
    ("attentive_accuracy", "results.csv", "all")])
def test_an_evaluation_that_keeps_nothing_is_no_result(tmp_path, monkeypatch, measure, file, head):
    """A number of an earlier evaluation in the same file is not taken for the new one."""
    (tmp_path / file).write_text(f"{head}\n" + ",".join("7" * len(head.split(","))) + "\n")
    monkeypatch.setattr(ablate.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    with pytest.raises(ValueError, match=f"added no row to .*{file}"):
        getattr(ablate, measure)(str(tmp_path))


def test_a_run_that_fails_is_named(ablate_main, capfd):
    with pytest.raises(SystemExit) as stop:
        ablate_main("0", extra=("--batch-size", "64"))  # there are 16 images
    assert stop.value.code == 2
    assert ("lab.ablate: error: one, seed 0: train.py ended with exit code 2; run the same command "
            "again" in capfd.readouterr().err)


def test_flags_that_cannot_be_are_refused_before_the_first_run(ablate_main, capfd, tmp_path):
    with pytest.raises(SystemExit) as stop:
        ablate_main("0", extra=("--lr", "-1"))
    assert stop.value.code == 2
    assert "error: --lr must be positive, got -1.0" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_damaged_args_json_is_named(text, ablate_main, capfd, tmp_path):
    run, = ablate.runs("main", [0], [])
    args = SimpleNamespace(runs=str(tmp_path / "runs"), table="main")
    out = ablate.folder(args, run, "")
    os.makedirs(out)
    with open(os.path.join(out, "args.json"), "w") as f:
        f.write(text)
    with pytest.raises(SystemExit) as stop:
        ablate.main(["main", "--runs", args.runs, "--results", str(tmp_path), "--seeds", "0"])
    assert stop.value.code == 2
    assert f"lab.ablate: error: {out}/args.json " in capfd.readouterr().err


def test_a_script_of_the_zoo_is_run_beside_train(tmp_path, monkeypatch):
    """The script is a copy of train.py, so both rows must come out the same."""
    tree = tmp_path / "tree"
    os.makedirs(tree)
    for path in glob.glob("*.py", root_dir=ROOT):
        shutil.copy(os.path.join(ROOT, path), tree)
    for name in ("fast", "support", "zoo", "lab"):
        shutil.copytree(os.path.join(ROOT, name), tree / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(tree / "train.py", tree / "zoo" / "copied.py")
    folder = make_images(tmp_path / "set")
    monkeypatch.setitem(tables.TABLES, "main", ("a test", [
        ("one", "--prototypes frozen"), ("two", "zoo/copied.py --prototypes frozen")]))
    monkeypatch.setattr(ablate, "ROOT", str(tree))  # where the scripts run
    monkeypatch.setitem(sys.modules, "zoo.copied", SimpleNamespace())  # it has no flags of its own
    monkeypatch.chdir(tree)
    ablate.main(["main", "--seeds", "0", "--", *TINY, "--data", folder])
    one, two = tabulate.read(tree / "results" / "main.csv", ["row"])
    assert [one[column] for column in MEASURED] == [two[column] for column in MEASURED]
    assert one["command"].startswith("train.py --prototypes frozen ")
    assert two["command"].startswith("zoo/copied.py --prototypes frozen ")
    scripts = {}
    for path in glob.glob(str(tree / "runs" / "main" / "*" / "args.json")):
        with open(path) as f:
            row = os.path.basename(os.path.dirname(path)).split("-")[0]
            scripts[row] = json.load(f)["script"]
    assert scripts == {"one": "train.py", "two": "zoo/copied.py"}


def parse_special(flags):
    """`parse` of a script of zoo/ whose first flag, --masked X, is one that train.py lacks."""
    args = config.parse(flags[2:])
    args.masked = float(flags[1])
    return args


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """A function (script, flags): the sentence with which their run is refused in the folder OUT,
    None if it is not. zoo/special.py has a flag of its own, and zoo/copied.py has none."""
    monkeypatch.setitem(sys.modules, "zoo.copied", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "zoo.special", SimpleNamespace(parse=parse_special))

    def call(script, flags):
        run = ablate.Run("a row", 0, script, [*flags.split(), "--device", "cpu"])
        try:
            ablate.refuse_another_run(run, str(tmp_path))
        except ValueError as error:
            return str(error).replace(str(tmp_path), "OUT")
    return call


@pytest.mark.parametrize("script, own", [("train.py", {}), ("zoo/copied.py", {}),
                                         ("zoo/special.py", {"masked": 0.5})])
def test_a_folder_of_another_run_is_refused(script, own, refusal, tmp_path):
    args = vars(config.parse(["--lr", "2", "--device", "cpu"])) | {"script": script} | own
    (tmp_path / "args.json").write_text(json.dumps(args))
    masked = "--masked 0.5 " if own else ""
    assert refusal(script, masked + "--lr 2") is None
    assert (refusal(script, masked + "--lr 3")
            == "OUT holds a run with other flags (--lr 2.0 -> 3.0); move it away")
    assert (refusal("zoo/other.py", masked + "--lr 2")
            == f"OUT holds a run of {script}, not of zoo/other.py; move it away")
    if own:
        assert (refusal(script, "--masked 0.25 --lr 2")
                == "OUT holds a run with other flags (--masked 0.5 -> 0.25); move it away")


def test_an_old_folder_without_a_script_is_of_train(refusal, tmp_path):
    assert refusal("train.py", "--lr 2") is None  # a folder without a run
    args = vars(config.parse(["--lr", "2", "--device", "cpu"]))
    del args["script"]
    (tmp_path / "args.json").write_text(json.dumps(args))
    assert refusal("train.py", "--lr 2") is None
    assert "holds a run of train.py" in refusal("zoo/copied.py", "--lr 2")


# ---- the printed table -------------------------------------------------------------------------
def result(row, seed, knn, block=""):
    return dict.fromkeys(tables.FIELDS, "0.5") | {
        "row": row, "seed": str(seed), "knn": str(knn), "block": block, "raw_knn": "40",
        "untrained_knn": "30", "steps": "10", "hardware": "a machine", "torch": "2", "date": "d"}


def test_mean_and_deviation_by_hand_and_blocks_apart(tmp_path):
    first, second = (row for row, _ in tables.TABLES["A2"][1][:2])
    file = str(tmp_path / "A2.csv")
    elsewhere = {"hardware": "another", "steps": "9"}
    for r in (result(second, 0, 60), result(first, 0, 50) | elsewhere, result(first, 1, 54),
              result(first, 2, 55), result(first, 0, 20, "--steps 3")):
        tabulate.add(file, tabulate.read_results("A2", file), r)
    text = tabulate.table("A2", tabulate.read_results("A2", file))
    # mean of 50, 54, 55 is 53; deviations -3, 1, 2: sqrt((9 + 1 + 4) / 2) = 2.65
    assert f"| {first} | 3 | 53.0 | 0.500 |" in text and "\n| ± sd | | 2.6 | 0.000 |" in text
    assert f"| {second} | 1 | 60.0 | 0.500 |" in text
    assert f"| {first} | 1 | 20.0 |" in text
    assert text.index(first) < text.index(second)  # the order of the table, not of the file
    assert text.startswith("`python -m lab.ablate A2`\n\n* Table A.2")
    assert "* 9 and 10 steps; k-NN" in text and "* a machine and another, torch 2, d" in text
    assert "`python -m lab.ablate A2 -- --steps 3`\n\n* Table A.2" in text
    assert len(ablate.main(["A2", "--show", "--results", str(tmp_path)])) == 5
    assert (tmp_path / "A2.png").stat().st_size > 1000 or not pytest.importorskip("matplotlib")


@pytest.mark.parametrize("argv, words", [
    (["main", "--show", "--results", "nowhere"], "nowhere/main.csv holds no results yet"),
    (["main", "--", "--seed", "3"], "--seed cannot follow --; use --seeds"),
    (["main", "--", "--seed=3", "--stop-at", "9"], "--seed, --stop-at cannot follow --"),
    (["main", "--rows", "CARP, joint", "--", "--method=dino"],
     "--method makes the row 'CARP, joint' of main what it is, and cannot follow --"),
    (["instrument", "--", "--lr", "1", "--epochs", "1"], "--epochs makes the row"),
    (["instrument", "--", "--steps", "60"], "--steps makes the row"),
    (["A1", "--", "--rescale"], "--rescale makes the row 'no annealing, no rescaling'"),
    (["A2", "--show", "--rows", "a 0.001, c 0.75"], "leave out --seeds, --rows and what follows"),
    (["A1", "--rows", "nope"],
     "--rows 'nope' is not a row of A1; there are: no responsibility forgetting"),
    (["A1", "--seeds", "0", "-1"], "--seeds must not be negative, got 0 -1"),
    (["A1", "--seeds", "9" * 20], "--seeds must be a number below 4294967296 in size, got 99"),
    (["A1", "--results", ""], "--results must not be empty"),
    (["A1", "--results", __file__], f"{__file__}: File exists"),
    (["A1", "--results", f"{__file__}/below"], f"{__file__}/below: Not a directory")])
def test_bad_input_is_one_sentence_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        ablate.main(argv)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("change, words", [
    (lambda text: "a,b\n1,2\n", "A2.csv lacks the column row"),
    (lambda text: "", "A2.csv lacks the column row"),
    (lambda text: text.replace("knn,", "nkn,", 1), "A2.csv lacks the column knn"),
    (lambda text: text.replace(",50,", ",fifty,", 1), "A2.csv: knn 'fifty' is no number"),
    (lambda text: text[:-40], "A2.csv has rows with more or fewer cells than columns"),
    (lambda text: text + "1,2\n", "A2.csv has rows with more or fewer cells than columns"),
    (lambda text: text.replace("a 0.001", "b 0.001"), "A2.csv has no row of the table A2"),
    (lambda text: "a" * 200_000, "A2.csv is not a csv file: field larger than field limit"),
])
def test_a_csv_of_others_or_a_damaged_one_is_named(change, words, tmp_path, capsys):
    row, _ = tables.TABLES["A2"][1][0]
    tabulate.add(str(tmp_path / "A2.csv"), [], result(row, 0, 50))
    damaged = change((tmp_path / "A2.csv").read_text())
    (tmp_path / "A2.csv").write_text(damaged)
    for flags in (["--show"], ["--dry-run"], []):
        with pytest.raises(SystemExit) as stop:
            ablate.main(["A2", "--results", str(tmp_path), "--runs", str(tmp_path), *flags])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert (tmp_path / "A2.csv").read_text() == damaged and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_a_number_that_is_not_finite_is_shown_as_such(value, tmp_path, capsys):
    file, (row, _) = str(tmp_path / "A2.csv"), tables.TABLES["A2"][1][0]
    tabulate.add(file, [result(row, 0, 50)], result(row, 1, value))
    ablate.main(["A2", "--show", "--results", str(tmp_path)])
    text = capsys.readouterr().out
    assert f"| {row} | 2 | {float(value)} |" in text and "| ± sd | | nan |" in text


def test_rows_of_an_earlier_table_stay_in_the_file_and_are_not_shown(tmp_path, capsys):
    file, (row, _) = str(tmp_path / "A2.csv"), tables.TABLES["A2"][1][0]
    tabulate.add(file, [], result("of old", 0, 50, "--steps 3"))
    tabulate.add(file, tabulate.read(file, ["row"]), result(row, 0, 60))
    ablate.main(["A2", "--show", "--results", str(tmp_path)])
    text = capsys.readouterr().out
    assert f"| {row} | 1 | 60.0 |" in text and "of old" not in text and "--steps 3" not in text
    assert [r["row"] for r in tabulate.read(file, [])] == ["of old", row]


def test_a_column_that_somebody_added_by_hand_stays(tmp_path):
    file, (row, _) = str(tmp_path / "A2.csv"), tables.TABLES["A2"][1][0]
    tabulate.add(file, [{**result(row, 0, 50), "my note": "a fan was off"}], result(row, 1, 60))
    assert [r["my note"] for r in tabulate.read(file, [])] == ["a fan was off", ""]


# ---- the tables that the project shows ---------------------------------------------------------
@pytest.fixture(scope="module")
def pages():
    """The text of README.md and of all pages in docs/."""
    paths = [os.path.join(ROOT, "README.md"), *glob.glob(os.path.join(ROOT, "docs", "*.md"))]
    text = ""
    for path in paths:
        with open(path) as f:
            text += f.read() + "\n"
    return text


FILES = glob.glob(os.path.join(ROOT, "results", "*.csv"))
KEPT = sorted(os.path.basename(file).removesuffix(".csv") for file in FILES)


@pytest.mark.parametrize("name", KEPT)
def test_every_kept_table_is_shown_as_it_is_printed(name, pages):
    """No number of a table is typed by hand, and every table has its control."""
    results = tabulate.read_results(name, os.path.join(ROOT, "results", f"{name}.csv"))
    lines_of_pages = set(pages.splitlines())
    for line in tabulate.table(name, results).splitlines():
        assert line in lines_of_pages, line
    assert any("frozen" in r["row"] for r in results)
    for r in results:
        assert r["command"].startswith(("train.py ", "zoo/")) and r["date"] and r["torch"]


def test_only_shares_have_the_scale_of_shares(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(tabulate.plots, "save", lambda fig, file: drawn.append(fig))
    row, _ = tables.TABLES["dense"][1][0]
    values = {"knn": "80", "h_rank": "12", "miou": "43", "used": ".9", "patch_drift": "1.3"}
    tabulate.draw("dense", [result(row, 0, 80) | dict.fromkeys(tables.FIELDS, "0.5") | values
                            | {"row": row, "block": ""}], str(tmp_path / "x.png"))
    panels = {ax.get_title(loc="left"): ax for ax in drawn[0].axes}
    for title, value in (("class tokens\nk-NN", 80), ("class tokens\nrank h", 12),
                         ("patches\nmIoU", 43), ("patches\ndrift", 1.3),
                         ("class tokens\nused", .9)):
        low, high = panels[title].get_xlim()
        assert low < value < high, title
    assert panels["patches\nused"].get_xlim() == (-.05, 1.05)


# ---- the table "space" ---------------------------------------------------------------------------
def test_a_picture_with_nothing_to_draw_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no row has k-NN, unique"):
        tabulate.draw("space", [{"row": "SOP, bank", "seed": "0", "block": "", "knn": "70",
                                 "unique_0.5": "", "used": ".5"}], str(tmp_path / "space.png"))


def test_the_picture_of_the_design_space(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def result(row, knn, unique, used, seed=0):
        return {"row": row, "seed": str(seed), "block": "", "knn": knn, "unique_0.5": unique,
                "used": used}
    drawn = {}
    real = tabulate.plots.save
    monkeypatch.setattr(tabulate.plots, "save", lambda fig, file: drawn.update(fig=fig) or real(
        fig, file))
    tabulate.draw("space", [
        result("CARP, joint", "80", ".2", ".1"), result("CARP, joint", "84", ".4", ".3", 1),
        result("CARP, frozen", "82", "1", ".5"), result("SOP, bank", "70", "", ".5"),
        result("DINO + Sinkhorn, live", "60", ".9", "1")], str(tmp_path / "space.png"))
    assert (tmp_path / "space.png").stat().st_size > 10_000
    carp, dino = drawn["fig"].axes  # the memory of bank has no unique share
    assert [ax.get_title(loc="left") for ax in (carp, dino)] == ["CARP", "DINO + Sinkhorn"]
    points, bars = carp.collections
    ends = [(low[1], high[1]) for low, high in bars.get_segments()]  # one deviation away
    assert ends == [pytest.approx((82 - 8 ** .5, 82 + 8 ** .5)), (82, 82)]
    assert points.get_offsets().tolist() == [[pytest.approx(.3), 82], [1, 82]]  # means of seeds
    assert points.get_sizes().tolist() == pytest.approx([10 + 500 * .2, 10 + 500 * .5])
    assert [text.get_text() for text in carp.texts] == ["joint", "frozen"]
    heights = [text.xyann[1] for text in carp.texts]
    assert abs(heights[0] - heights[1]) >= .05  # the names do not cover each other


# ---- the table "dense" -----------------------------------------------------------------------
def run_here(command, cwd):
    """In place of subprocess.run: `python -m MODULE FLAGS` in this process."""
    assert command[:2] == [sys.executable, "-m"] and cwd == ROOT
    importlib.import_module(command[2]).main(command[3:])
    return SimpleNamespace(returncode=0)


def test_the_dense_table_measures_both_kinds_of_prototypes(tmp_path, capfd, monkeypatch):
    draw = shapes.make
    monkeypatch.setattr(shapes, "make", lambda n, seed: draw(n // 50, seed))
    monkeypatch.setattr(ablate, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(ablate, "SEGMENTED", ["--train-images", "40", "--test-images", "20"])
    flags = [*TINY, "--arch", "vit_micro", "--num-patch-prototypes", "8"]
    results = ablate.main(["dense", "--rows", "iBOT, frozen", "--seeds", "0",
                           "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--",
                           *flags])
    text = capfd.readouterr().out
    assert "| class tokens | runs |" in text and "| patches | runs | mIoU |" in text
    row, = results
    log = tabulate.read(str(tmp_path / "runs/dense" / os.listdir(tmp_path / "runs/dense")[0]
                          / "log.csv"), ["patch_used"])
    for column in ("patch_used", "patch_place_nats", "used"):
        assert row[column] == log[-1][column] != ""
    assert 0 < float(row["miou"]) < 100 and 0 < float(row["untrained_miou"]) < 100
    assert f"* mIoU of raw pixels {float(row['raw_miou']):.1f}, " in text


def test_the_table_of_capi_measures_both_sets(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(ablate, "PROBED", ["--steps", "2"])
    flags = ["--device", "cpu", "--batch-size", "8", "--steps", "4", "--num-prototypes", "16",
             "--eval-bank", "16", "--eval-queries", "8", "--data", make_images(tmp_path / "set")]
    row, = ablate.main(["capi", "--rows", "frozen clusters, all patches", "--seeds", "0",
                        "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--", *flags])
    text = capfd.readouterr().out
    for heading in ("features", "targets", "teacher's clusters", "student's set"):
        assert f"| {heading} | runs | " in text
    out, = (tmp_path / "runs" / "capi").iterdir()
    log = tabulate.read(str(out / "log.csv"), ["student_used"])
    for column in ("student_used", "target_entropy", "entropy_floor", "place_nats", "used"):
        assert row[column] == log[-1][column] != ""
    assert 0 <= float(row["attentive"]) <= 100 and not row["miou"]  # a folder has no label maps


# ---- the table "instrument" --------------------------------------------------------------------
def rows_of_instrument(**changes):
    """{row: [result]} of a default run that can tell much; changes: {row: [k-NN]}."""
    knn = {}
    for system in tables.SYSTEMS:
        knn[f"{system}, a third"] = [60, 61, 62]
        knn[f"{system}, default length"] = [80, 80.5, 81, 81.5, 82]
        knn[f"{system}, three times"] = [84, 84, 84]
    knn["labels, default length"] = [95, 95, 95]
    return {row: [{"seed": str(seed), "knn": str(value), "raw_knn": "40", "untrained_knn": "35"}
                  for seed, value in enumerate(values)]
            for row, values in (knn | changes).items()}


def words_of(line):
    """"met", "NOT MET" or "not run" of a line of the verdict."""
    return line.split(": ")[1].split(" (")[0]


def test_the_verdict_on_the_instrument_by_hand():
    lines = tabulate.verdict(rows_of_instrument())
    assert [words_of(line) for line in lines] == ["met"] * 6
    joint = [line.split("CARP, joint ")[1].split(",")[0] for line in lines]
    # 84 less the mean of seeds 0 to 2; that less 61; the deviation; 81 less 40; 81; 95 less 80.5
    assert [float(value.strip(")")) for value in joint] == [3.5, 19.5, 0.8, 41, 81, 14.5]


def test_the_verdict_compares_the_same_seeds():
    rows = rows_of_instrument()
    of_labels = rows["labels, default length"]
    of_labels[:] = [result | {"seed": seed} for result, seed in zip(of_labels, "43")]
    last = tabulate.verdict(rows)[5]
    assert "CARP, joint 13.2" in last  # 95 less the mean of 81.5 and 82


@pytest.mark.parametrize("row, values, fails", [
    ("DINO, joint, three times", [79.5, 79.5, 79.5], [0]),  # 1 point below the first three seeds
    ("CARP, frozen, a third", [82, 82, 82], [1]),
    ("CARP, joint, default length", [77, 80, 81, 82, 85], [2]),
    ("CARP, joint, default length", [59, 59, 59, 59, 59], [1, 3]),
    ("CARP, decoupled, default length", [89, 89, 89, 89, 89], [0, 4]),
    ("labels, default length", [85, 85, 85], [5])])
def test_the_verdict_names_what_the_instrument_cannot_do(row, values, fails):
    words = [words_of(line) for line in tabulate.verdict(rows_of_instrument(**{row: values}))]
    assert [i for i, word in enumerate(words) if word == "NOT MET"] == fails


def test_the_verdict_does_not_hide_what_was_not_run():
    rows = rows_of_instrument()
    del rows["DINO, joint, three times"], rows["labels, default length"]
    words = [words_of(line) for line in tabulate.verdict(rows)]
    assert words == ["not run", "met", "met", "met", "met", "not run"]
    assert {words_of(line) for line in tabulate.verdict({})} == {"not run"}


def test_a_claim_about_controls_is_not_met_by_a_control_that_was_lost():
    rows = rows_of_instrument()
    for row in rows["CARP, joint, default length"]:
        row["raw_knn"] = ""
    assert words_of(tabulate.verdict(rows)[3]) == "not run"


def test_two_blocks_of_the_instrument_are_apart(monkeypatch):
    monkeypatch.setattr(tabulate, "verdict", lambda rows: ["* a claim"])
    row, _ = tables.TABLES["instrument"][1][0]
    text = tabulate.table("instrument", [result(row, 0, 50), result(row, 0, 50, "--steps 3")])
    assert "* a claim\n\n`python -m lab.ablate instrument -- --steps 3`" in text


def test_the_instrument_runs_five_seeds_at_the_default_length():
    seeds = {}
    for run in ablate.runs("instrument", None, []):
        seeds.setdefault(run.row, []).append(run.seed)
    assert seeds["CARP, joint, default length"] == [0, 1, 2, 3, 4]
    assert seeds["CARP, joint, three times"] == seeds["labels, default length"] == [0, 1, 2]
    once = ablate.runs("instrument", [0], [])
    lengths = {run.row: config.parse(run.flags).epochs for run in once}
    usual = config.parse([]).epochs
    assert lengths["DINO, joint, a third"] == pytest.approx(usual / 3, rel=1e-4)
    assert lengths["DINO, joint, three times"] == 3 * usual


def test_the_picture_is_of_runs_without_flags_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tabulate.plots, "space", lambda means, file: drawn.append(means))
    rows = [{"row": "CARP, joint", "seed": "0", "block": block, "knn": knn, "unique_0.5": ".2",
             "used": ".1"} for block, knn in (("--steps 3", "20"), ("", "80"))]
    tabulate.draw("space", rows, str(tmp_path / "x.png"))
    tabulate.draw("space", rows[:1], str(tmp_path / "x.png"))
    assert [means["CARP, joint"]["knn"] for means in drawn] == [80, 20]


@pytest.mark.parametrize("values, third, fails", [
    ([80, 80, 80], [80.4, 80.4, 80.4], []), ([80, 80, 80], [80.6, 80.6, 80.6], [1]),
    ([60.1, 60.1, 60.1], [60, 60, 60], []), ([59.9, 59.9, 59.9], [59, 59, 59], [3]),
    ([79, 80.4, 81.8], [60, 60, 60], []), ([78.6, 80.4, 82.2], [60, 60, 60], [2]),
    ([87.9, 87.9, 87.9], [60, 60, 60], []), ([88.1, 88.1, 88.1], [60, 60, 60], [4])])
def test_where_a_claim_about_the_instrument_ends_to_be_met(values, third, fails):
    knn = {}
    for system in tables.SYSTEMS:
        knn |= {f"{system}, a third": [60, 60, 60], f"{system}, default length": [80, 80, 80],
                f"{system}, three times": [90, 90, 90]}
    knn |= {"labels, default length": [95, 95, 95], "CARP, joint, default length": values,
            "CARP, joint, a third": third}
    rows = {row: [{"seed": str(seed), "knn": str(value), "raw_knn": "40", "untrained_knn": "35"}
                  for seed, value in enumerate(of_row)] for row, of_row in knn.items()}
    words = [words_of(line) for line in tabulate.verdict(rows)]
    assert [i for i, word in enumerate(words) if word == "NOT MET"] == fails
