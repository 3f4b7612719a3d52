"""lab/gpu.py: its checks find a wrong value, its runs take turns, and the minutes are kept."""
import csv
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch

from lab import bench, gpu

FAST = [name for name in gpu.CHECKS if not name.startswith(("a run", "crops"))]


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# ---- checks ------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here"))])
def test_the_device_computes_what_a_cpu_does(device, tmp_path, capsys):
    """On a CPU this compares fast files with plain ones; on a GPU, all with a CPU."""
    assert gpu.check_all(device, str(tmp_path), FAST) == []
    found = rows(tmp_path / "checks.csv")
    assert [row["check"] for row in found] == FAST
    assert all(row["passed"] == "True" and row["error"] == "" for row in found)


def test_a_run_that_is_resumed_is_compared_with_one_that_is_not(monkeypatch):
    losses = iter(["2.0", "1.0", "2.1"])

    def call(words, *_):
        out = words[words.index("--out") + 1]
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, "log.csv"), "w") as f:
            f.write(f"step,loss\n0,\n12,{next(losses)}\n")
    monkeypatch.setattr(gpu, "call", call)
    assert gpu.resume_check("cpu") == pytest.approx(0.05)


@pytest.mark.parametrize("module, name, check", [
    (gpu.contestants.fast.losses, "carp", "CARP's loss of fast/losses.py, beside losses.py"),
    (gpu.contestants.fast.losses, "dino", "DINO's loss of fast/losses.py, beside losses.py")])
def test_a_loss_that_differs_by_a_thousandth_is_found(module, name, check, tmp_path, monkeypatch):
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: {key: 1.001 * term
                                                  for key, term in original(*a).items()})
    bad, = gpu.check_all("cpu", str(tmp_path), [check])
    assert bad.startswith(f"{check}: 0.001") and bad.endswith("allowed 0.0001")


def test_a_mixture_that_differs_is_found(tmp_path, monkeypatch):
    class Wrong(gpu.FastGMM):
        def update(self, h, beta, eta):
            super().update(h, beta, eta - 1e-3)
    monkeypatch.setattr(gpu, "FastGMM", Wrong)
    bad, = gpu.check_all("cpu", str(tmp_path), ["mixture of fast/gmm.py, beside gmm.py"])
    assert "mixture of fast/gmm.py" in bad


def test_an_error_fails_its_own_check_alone(tmp_path, monkeypatch, capsys):
    def broken(device):
        raise RuntimeError("no kernel for this\nand more")
    monkeypatch.setitem(gpu.CHECKS, "broken", (broken, 1.0))
    bad = gpu.check_all("cpu", str(tmp_path), ["broken", "k-NN: scores"])
    assert bad == ["broken: no kernel for this"]
    assert [row["passed"] for row in rows(tmp_path / "checks.csv")] == ["False", "True"]


def test_values_that_are_not_finite_or_of_another_shape_differ():
    x = torch.ones(3)
    assert gpu.apart([x * float("nan")], [x]) == gpu.apart([x[:2]], [x]) == float("inf")
    assert gpu.apart([x + 0.5], [2 * x]) == 0.25


# ---- commands that must not outlive the time ---------------------------------------------------
def test_a_command_is_ended_when_its_time_is_over():
    begin = time.monotonic()
    assert gpu.call(["-c", "import time; time.sleep(60)"], 0.5) is False
    assert time.monotonic() - begin < 20
    assert gpu.call(["-c", "pass"], 60) is True


def test_a_command_that_fails_is_one_sentence():
    words = ["-c", "import sys; print('first', file=sys.stderr); sys.exit('the last line')"]
    with pytest.raises(ValueError, match="ended with exit code 1: the last line$"):
        gpu.call(words, 60)


# ---- the parts ---------------------------------------------------------------------------------
def options(tmp_path, **given):
    return SimpleNamespace(**{"out": str(tmp_path), "device": "cpu", "toy": True, "data": "shapes",
                              "data_root": "data", "turn": 10, "flags": ["--lr", "0.01"]} | given)


def pretend_runs(monkeypatch, total, seconds=0.0):
    """Runs that only write a log. Returns the list that their (kind, steps) go to."""
    calls = []

    def call(words, left):
        kind, out, stop = (words[words.index(flag) + 1]
                           for flag in ("--prototypes", "--out", "--stop-at"))
        assert words[0] == "train.py" and "--resume" in words and "--lr" in words
        calls.append((kind, int(stop)))
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, "args.json"), "w") as f:
            json.dump({"data_seen": {"steps": total}}, f)
        assert int(stop) <= total  # train.py refuses to stop beyond the end
        row = {"step": stop, "loss": 1, "images_per_s": 5}
        row |= dict.fromkeys(gpu.COLUMNS[2:], 0.5)
        with open(os.path.join(out, "log.csv"), "w", newline="") as f:
            writer = csv.DictWriter(f, row)
            writer.writeheader()
            writer.writerow(row)
        time.sleep(seconds)
        return True
    monkeypatch.setattr(gpu, "call", call)
    monkeypatch.setattr(gpu.data, "load", lambda *a, **k: None)
    return calls


def test_runs_take_turns_until_they_are_over(tmp_path, monkeypatch, capsys):
    """Their length is known after the first turn, or from --steps."""
    calls = pretend_runs(monkeypatch, total=15)
    assert gpu.runs(options(tmp_path, toy=False), gpu.Deadline(5)) == ([], [])
    assert calls == [(kind, steps) for steps in (10, 15) for kind in gpu.KINDS]
    calls.clear()
    short = options(tmp_path / "other", turn=1000, flags=["--lr", "0.01", "--steps", "15"])
    assert gpu.runs(short, gpu.Deadline(5)) == ([], [])
    assert calls == [(kind, 15) for kind in gpu.KINDS]
    found = rows(tmp_path / "runs.csv")
    assert [(row["prototypes"], row["step"]) for row in found] == [(k, "15") for k in gpu.KINDS]


def test_no_turn_begins_that_would_outlast_the_minutes(tmp_path, monkeypatch):
    calls = pretend_runs(monkeypatch, total=30, seconds=0.4)
    monkeypatch.setattr(gpu, "LEAST_LEFT", 0.1)
    bad, left_out = gpu.runs(options(tmp_path), gpu.Deadline(1.1 / 60))
    assert bad == [] and len(calls) == 2
    assert left_out == ["steps after 0 of the runs, decoupled first"]


def test_every_benchmark_has_flags_that_lab_bench_takes(tmp_path, monkeypatch):
    for toy in (True, False):
        calls = []
        monkeypatch.setattr(gpu, "call", lambda words, *a, **k: calls.append(words) or True)
        assert gpu.bench_all(options(tmp_path, toy=toy), gpu.Deadline(5)) == ([], [])
        items = []
        for words in calls:
            assert words[:2] == ["-m", "lab.bench"]
            parsed = bench.parser().parse_args(words[2:])
            assert parsed.csv == str(tmp_path / "bench.csv") and parsed.device == "cpu"
            items += parsed.items
            if not toy and "step" in parsed.items:
                assert parsed.paper and parsed.step_flags == gpu.VIT_S
        assert sorted(items) == ["gmm", "knn", "loss", "step", "unique"]


def test_a_benchmark_without_time_is_named_and_a_failing_one_too(tmp_path, monkeypatch):
    _, left_out = gpu.bench_all(options(tmp_path), gpu.Deadline(0))
    assert len(left_out) == len(gpu.TOY_SIZES) and "lab.bench step" in left_out[0]

    def fail(*a, **k):
        raise ValueError("it failed")
    monkeypatch.setattr(gpu, "call", fail)
    assert gpu.bench_all(options(tmp_path), gpu.Deadline(5)) == (["it failed"] * 3, [])


def test_the_exit_code_says_whether_all_was_well(tmp_path, monkeypatch, capsys):
    command = ["--device", "cpu", "--out", str(tmp_path / "out"), "--parts", "checks"]
    for bad, code in (([], 0), (["k-NN: 3, allowed 1"], 1)):
        monkeypatch.setattr(gpu, "check_all", lambda *a, bad=bad: bad)
        with pytest.raises(SystemExit) as stop:
            gpu.main(command)
        assert stop.value.code == code
    assert "lab.gpu: k-NN: 3, allowed 1" in capsys.readouterr().err


@pytest.mark.parametrize("flags, sentence", [
    (["--minutes", "0"], "--minutes must be positive, got 0"),
    (["--turn", "0"], "--turn must be at least 1, got 0"),
    (["--device", "abacus"], "--device must be cpu or cuda, got abacus"),
    (["--device", "cpu", "--data", "nowhere"], "--data nowhere is neither a folder nor one of"),
    (["--device", "cpu", "--data", ".", "--", "--lr", "-1"], "--lr must be positive, got -1"),
    (["--device", "cpu", "--data", ".", "--", "--hue", "1"], "unrecognized arguments: --hue 1"),
    (["--device", "cpu", "--data", ".", "--", "--stop-at=3", "--prototypes", "live"],
     "--prototypes, --stop-at cannot follow --: the runs have their own")])
def test_bad_input_is_one_sentence(flags, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out")


def test_times_of_a_race_go_to_a_file_as_they_come(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "race", lambda item, ways, *a: dict.fromkeys(ways, ([2.0, 4.0], 7)))
    file = tmp_path / "b.csv"
    bench.main(["unique", "--csv", str(file)])
    bench.main(["knn", "--csv", str(file)])
    found = rows(file)
    assert [row["way"] for row in found] == ["ours", "plain", "floor"] * 2
    assert {(row["seconds"], row["mb"], row["mb_of"]) for row in found} == {("3.0", "7", "extra")}
    with pytest.raises(SystemExit):
        bench.main(["knn", "--csv", str(tmp_path / "nowhere" / "b.csv")])
    out, err = capsys.readouterr()
    assert "nowhere/b.csv: No such file" in err and out.count("unique: 16384") == 1
    assert found[0]["what"].startswith("unique: 16384")
