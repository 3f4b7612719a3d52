"""bench.py: a comparison is fair only if its sides agree; and what is printed is what was measured."""
import argparse

import pytest
import torch

from lab import bench
from lab import sides

TINY = dict(K=64, D=8, N=20, V=4, B=3, P=16, unique=60, bank=50, queries=7, device="cpu", reps=1)


def agree(item, names=("ours", "plain"), **change):
    got = (getattr(sides, item)(name, argparse.Namespace(**{**TINY, **change}))() for name in names)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in got), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def test_the_sides_of_the_bench_agree():
    agree("gmm")
    agree("gmm", ("streaming", "plain"))
    for joint in (False, True):
        agree("loss", joint=joint)
        agree("dino", joint=joint)
    agree("unique")
    agree("unique", unique=90, D=2)  # two dimensions: many are duplicates
    agree("knn")
    assert sides.data("ours", None)().shape == sides.data("plain", None)().shape == (32, 3, 32, 32)


def test_every_side_has_its_own_process_and_a_line_with_a_verdict(capsys, monkeypatch):
    got = bench.race("unique", ("ours", "floor"), argparse.Namespace(**TINY))
    assert all(len(seconds) == 1 and seconds[0] > 0 and peak >= 0 for seconds, peak in got.values())
    # the machine is three times slower in the third turn; the floor is lucky in the first, unlucky in the second
    full = {"ours": ([1.0, 1.0, 3.0], 100.0), "streaming": ([1.8, 1.8, 5.4], 50.0), "plain": ([2.0, 2.0, 6.0], 1000.0),
            "floor": ([0.5, 1.2, 2.4], 5.0)}
    monkeypatch.setattr(bench, "race", lambda item, names, a, reps=None: {name: full[name] for name in names})
    bench.main(["gmm", "loss", "unique", "knn", "data"])
    lines = capsys.readouterr().out.splitlines()
    assert "torch " + torch.__version__ in lines[0]
    assert sum("target" in line for line in lines) == 4 + 4 * 2 + 2 + 2 + 1
    assert "    ours / floor 1.25   target <= 1.3: met" in lines and "    plain / ours 2   target >= 20: NOT MET" in lines


def test_the_bench_sees_memory_that_is_taken_and_freed():
    seconds, peak = bench.turn(lambda: torch.ones(2 ** 24).sum(), "cpu", True)
    assert 60 < peak < 100 and seconds > 0


def test_the_bench_reads_whole_runs(capsys, monkeypatch):
    """step and ranks on made-up logs: which column of which run goes where."""
    def made_up(*flags, processes=1, threads=None):
        fast = "decoupled" in flags
        row = {"images_per_s": "20" if fast else "10", "memory_mb": "90" if fast else "100", "loss": str(1 + 1e-3 * (processes == 4))}
        return [row, row], torch.ones(2)
    monkeypatch.setattr(bench, "train", made_up)
    a = argparse.Namespace(**TINY, batch=8, steps=2, step_flags=[])
    bench.step(a)
    bench.ranks(a)
    text = capsys.readouterr().out
    assert "time 0.5 " in text and "memory 0.9 " in text and text.count("NOT MET") == 2 and text.count("4 processes, largest difference of a loss 0.001") == 2


def test_bad_sizes_of_the_bench(capsys):
    for flags, sentence in ((["gmn"], "gmn is none of the items"), (["loss", "--K", "100"], "--K 100 must be a multiple of --P 512")):
        with pytest.raises(SystemExit) as stop:
            bench.main(flags)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
