"""lab/bench.py: a comparison is fair only if all contestants do the same work; and what is printed
is what was measured."""
import argparse
from types import SimpleNamespace

import pytest
import torch

import forked
from lab import bench, contestants

TINY = {"K": 64, "D": 8, "N": 20, "V": 4, "B": 3, "P": 16, "unique": 60, "bank": 50, "queries": 7,
        "device": "cpu", "reps": 1}


def result(item, way, **sizes):
    """What a contestant returns after one turn, as a list of tensors."""
    x = getattr(contestants, item)(way, argparse.Namespace(**{**TINY, **sizes}))()
    return list(x) if isinstance(x, tuple) else [x]


def assert_same_work(item, ways=("ours", "plain"), **sizes):
    expected = result(item, ways[-1], **sizes)
    for way in ways[:-1]:
        for x, y in zip(result(item, way, **sizes), expected, strict=True):
            assert torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5), (item, way)
    return expected


def test_all_contestants_of_the_mixture_do_the_same_work(monkeypatch):
    ways = ("ours", "streaming", "readable", "plain")
    assert_same_work("gmm", ways)
    monkeypatch.setitem(contestants.KEEP, "streaming", 300)  # 4 vectors at a time
    assert_same_work("gmm", ways)


def test_the_fast_mixture_is_what_races(monkeypatch):
    """ours and streaming differ in how much is in memory, and neither is the readable mixture."""
    made = []
    real = contestants.FastGMM
    monkeypatch.setattr(contestants, "FastGMM", lambda *a, keep, **k: made.append(keep) or
                        real(*a, keep=keep, **k))
    for way in ("ours", "streaming", "readable", "plain", "floor"):
        result("gmm", way)
    assert made == [2 ** 40, 2 ** 25]


@pytest.mark.parametrize("item", ["loss", "dino"])
def test_the_losses_do_the_same_work(item, monkeypatch):
    monkeypatch.setattr(contestants.fast.losses, "logits_at_a_time", lambda device: 200)
    assert len(assert_same_work(item, joint=False)) == 1  # the gradient of h
    of_h, of_C = assert_same_work(item, joint=True)  # (V, B, D) (K, D)
    assert of_C.shape == (64, 8) and of_C.abs().max() > 0


def test_joint_prototypes_of_student_and_teacher_differ():
    protos_s, protos_t = contestants.prototype_sets(argparse.Namespace(**TINY, joint=True))
    assert not torch.equal(protos_s.weight, protos_t.weight)
    assert protos_s.weight.requires_grad and not protos_t.weight.requires_grad


def test_the_searches_do_the_same_work():
    assert len(assert_same_work("unique")[0]) == 60  # all distinct
    some, = assert_same_work("unique", unique=90, D=2)  # in two dimensions many are duplicates
    assert 1 < len(some) < 90
    assert_same_work("knn")
    assert_same_work("patches", joint=True)
    shapes = [x.shape for way in ("ours", "plain") for x in result("data", way)]
    assert shapes == 2 * [(64, 3, 32, 32)]


@pytest.mark.parametrize("item, sizes", [("gmm", {}), ("loss", {"joint": False}),
                                         ("loss", {"joint": True}), ("unique", {}), ("knn", {})])
def test_the_floors_run(item, sizes):
    result(item, "floor", **sizes)


# ---- the race ----------------------------------------------------------------------------------
@pytest.fixture
def quick_start(monkeypatch):
    """A contestant's process is a fork in which torch is loaded, and so is a run's."""
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda method: forked.server)
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=forked.run))


def test_every_contestant_has_its_own_process(quick_start):
    measured = bench.race("unique", ("ours", "floor"), argparse.Namespace(**TINY), reps=2)
    for seconds, peak in measured.values():
        assert len(seconds) == 2 and min(seconds) > 0 and peak >= 0


def test_a_process_that_ends_is_named(quick_start):
    """64 prototypes are no multiple of 24, so the process of the plain way raises."""
    with pytest.raises(ValueError, match="loss: the process of 'plain' ended with code 2"):
        bench.race("loss", ("plain",), argparse.Namespace(**TINY | {"P": 24}, joint=False))


def test_memory_that_is_taken_and_freed_counts():
    torch.ones(2 ** 26).sum()  # 256 MB before the turn, which are none of its own
    seconds, peak = bench.turn(lambda: torch.ones(2 ** 24).sum(), "cpu", True)
    assert 60 < peak < 100 and seconds > 0  # MB; the tensor has 64


def test_a_median_over_rounds_and_a_verdict_each(capsys, monkeypatch):
    # the machine is three times slower in the third round; the floor is lucky in the first round
    # and unlucky in the second
    measured = {"ours": ([1.0, 1.0, 3.0], 100.0), "streaming": ([1.8, 1.8, 5.4], 50.0),
                "readable": ([1.5, 1.5, 4.5], 200.0), "plain": ([2.0, 2.0, 6.0], 1000.0),
                "floor": ([0.5, 1.2, 2.4], 5.0)}
    races = []

    def race(item, ways, options, reps=None):
        races.append((item, getattr(options, "joint", None)))
        return {way: measured[way] for way in ways}

    monkeypatch.setattr(bench, "race", race)
    bench.main(["gmm", "loss", "unique", "knn", "data"])
    lines = capsys.readouterr().out.splitlines()
    assert races == [("gmm", None), ("loss", False), ("loss", True), ("dino", False),
                     ("dino", True), ("unique", None), ("knn", None), ("data", None)]
    assert "torch " + torch.__version__ in lines[0]
    of_losses = 3 * 2  # of decoupled prototypes time and memory, of joint ones time alone
    assert sum("target" in line for line in lines) == 4 + of_losses + 2 + 2 + 1
    assert "    ours / floor 1.25   target <= 1.3: met" in lines
    assert "    streaming / floor 2.25   target <= 1.9: NOT MET" in lines
    assert "    plain / ours 2   target >= 1.5: met" in lines
    assert "    plain / ours 2   target >= 20: NOT MET" in lines
    assert "    readable / ours 1.5" in lines
    assert lines.count("    memory, ours / plain 0.1   target <= 0.1: met") == 2
    assert sum(line.startswith("    memory, ours / plain 0.1   (the gradient of C")
               for line in lines) == 2


def test_several_N_are_several_races(monkeypatch, capsys):
    races = []

    def race(item, ways, options, reps=None):
        races.append(options.N)
        return dict.fromkeys(ways, ([1.0], 1.0))

    monkeypatch.setattr(bench, "race", race)
    bench.main(["gmm", "--N", "5", "7"])
    assert races == [5, 7] and "N 7" in capsys.readouterr().out


# ---- whole runs --------------------------------------------------------------------------------
def test_which_column_of_which_run_goes_where(capsys, monkeypatch):
    """step and ranks on made-up logs."""
    def train(*flags, processes=1, threads=None):
        decoupled = "decoupled" in flags
        row = {"images_per_s": "20" if decoupled else "10",
               "memory_mb": "90" if decoupled else "100",
               "loss": str(1 + 1e-3 * (processes == 4))}
        return [row, row], torch.ones(2)

    monkeypatch.setattr(bench, "train", train)
    options = argparse.Namespace(**TINY, batch=8, steps=2, step_flags=[], csv=None)
    bench.bench_step(options)
    bench.bench_ranks(options)
    text = capsys.readouterr().out
    assert "time 0.5 " in text and "memory 0.9 " in text
    assert text.count("NOT MET") == 2
    assert text.count("4 processes, largest difference of a loss 0.001") == 2


@pytest.mark.parametrize("flags, sentence", [
    (["gmn"], "lab.bench: error: gmn is none of the items"),
    (["loss", "--K", "100"], "lab.bench: error: --K 100 must be a multiple of --P 512"),
    (["gmm", "--K", "0"], "--K must be at least 1, got 0"),
    (["gmm", "--N", "8", "-1"], "--N must be at least 1, got 8 -1"),
    (["--reps", "0"], "--reps must be at least 1, got 0"),
    (["loss", "--V", "1"], "--V must be at least 2, as the teacher has two views, got 1"),
    (["step", "--steps", "1"], "--steps must be at least 2, as the first step is not counted"),
    (["knn", "--bank", "19"], "--bank must be at least 20, the neighbours of a query, got 19"),
    (["unique", "--D", "9" * 20], "--D must be a number below 4294967296 in size, got 9999"),
    (["--device", ""], "--device must not be empty"),
    (["--device", "abacus"], "--device must be cpu or cuda, got abacus")])
def test_bad_input_is_one_sentence_and_exit_code_2(flags, sentence, capsys, monkeypatch):
    monkeypatch.setattr(bench, "ITEMS", dict.fromkeys(bench.ITEMS))
    with pytest.raises(SystemExit) as stop:
        bench.main(flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and sentence in err and not out


def test_a_run_that_fails_is_one_sentence(quick_start):
    sentence = "(?s)train.py --lr -1 ended with exit code 2: .*--lr must be positive"
    with pytest.raises(ValueError, match=sentence):
        bench.train("--lr", -1)


def test_items_of_the_cpu_are_not_timed_under_the_name_of_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(bench, "choose_device", lambda device: device)
    done = []
    for name in bench.ITEMS:
        monkeypatch.setitem(bench.ITEMS, name, lambda options, name=name: done.append(name))
    bench.main(["--device", "cuda"])
    assert done == [name for name in bench.ITEMS if name not in ("data", "loop", "ranks")]
    done.clear()
    bench.main([])
    assert done == [*bench.ITEMS]
    done.clear()
    with pytest.raises(SystemExit) as stop:
        bench.main(["knn", "loop", "--device", "cuda"])
    assert stop.value.code == 2 and not done
    assert capsys.readouterr().err == ("lab.bench: error: loop is measured on the CPU alone, got "
                                       "--device cuda\n")
