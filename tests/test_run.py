"""What a run survives: stops, kills, signals, full disks, damaged and foreign files, numbers that are not finite."""
import contextlib
import csv
import errno
import functools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from torchvision.utils import save_image

import data
import methods
import models
from support import optim
from support import run as folder
from support import shapes
import train
import views
from support import weights
from gmm import OnlineGMM

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--device", "cpu", "--batch-size", "8", "--steps", "6", "--num-prototypes", "16", "--partition-size", "8",
        "--bottleneck-dim", "8", "--head-hidden", "16", "--local-crops", "1", "--eval-bank", "60", "--eval-queries", "40",
        "--log-every", "2", "--eval-every", "6", "--gmm-start", "1"]
TIMES = ("images_per_s", "data_share", "memory_mb")


@functools.lru_cache
def small():
    x, y, classes = shapes.make(150, 5)
    images = data.Images(x, y, classes, "shapes")
    return data.subset(images, torch.arange(100)), data.subset(images, torch.arange(100, 150))


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    real = data.load
    monkeypatch.setattr(data, "load", lambda name, **kw: small() if name == "shapes" else real(name, **kw))


def run(out, *flags):
    return train.main([*TINY, "--out", str(out), *map(str, flags)])


def refused(capsys, out, *flags, code=2):
    with pytest.raises(SystemExit) as stop:
        run(out, *flags)
    assert stop.value.code == code
    return capsys.readouterr().err.strip().splitlines()[-1]


def ckpt(out, name="ckpt.pt"):
    return torch.load(out / name, weights_only=True)


def flat(x, name=""):
    if isinstance(x, (dict, list, tuple)):
        return {k: v for key, part in (x.items() if isinstance(x, dict) else enumerate(x)) for k, v in flat(part, f"{name}/{key}").items()}
    return {name: x}


def different(a, b, *parts):
    """Paths of tensors and numbers that are not the same to the bit, args aside; parts: only these."""
    a, b = ({k: v for k, v in flat(c).items() if k.split("/")[1] != "args" and (not parts or k.split("/")[1] in parts)} for c in (a, b))
    assert a and a.keys() == b.keys()
    return [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]


def rows(out):
    with open(out / "log.csv", newline="") as f:
        return [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(f)]


def make_folder(path, n=24, broken=0, size=32):
    for c in "ab":
        os.makedirs(path / c)
        for i in range(n // 2):
            save_image(torch.rand(3, size, size, generator=torch.Generator().manual_seed(ord(c) * 1000 + i)), path / c / f"{i}.png")
    for i in range(broken):
        name = path / "ab"[i % 2] / f"{5 + i}.png"
        open(name, "r+b").truncate(30)
    return str(path)


def at_step(monkeypatch, what, *steps):
    """Do what(loss terms) -> loss terms inside the given steps, counted from 0."""
    real = methods.CARPLoss.forward

    def forward(self, h_s, h_t, protos_s, protos_t, step):
        terms = real(self, h_s, h_t, protos_s, protos_t, step)
        return what(terms) if step in steps else terms
    monkeypatch.setattr(methods.CARPLoss, "forward", forward)


# ---- exact resume ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prototypes, flags", [
    ("decoupled", ["--accum", "2"]), ("joint", ["--accum", "4"]), ("decoupled", ["--workers", "1", "--drop-path", "0.5"])])
def test_stopped_anywhere_and_resumed_is_the_same_to_the_bit(tmp_path, monkeypatch, prototypes, flags):
    """Weights, optimiser, mixture and log; stopped between two rows of the log; with accumulation, and with workers."""
    if "--workers" in flags:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
        flags = [*flags, "--data", make_folder(tmp_path / "set", 40)]
    flags = [*flags, "--prototypes", prototypes, "--save-every", "1"]
    run(tmp_path / "whole", *flags)
    for stop in ("1", "3", "6"):
        run(tmp_path / "parts", *flags, "--stop-at", stop, "--resume")
    assert not different(ckpt(tmp_path / "whole"), ckpt(tmp_path / "parts"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert [r["step"] for r in rows(tmp_path / "whole")] == ["0", "2", "4", "6"]


def test_a_row_is_the_mean_of_its_steps(tmp_path):
    run(tmp_path / "1", "--log-every", "1", "--stop-at", "2", "--head-norm")
    run(tmp_path / "2", "--head-norm")
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    for name in ("loss", "grad_norm", "entropy"):
        assert (float(one[1][name]) + float(one[2][name])) / 2 == pytest.approx(float(two[1][name]), rel=1e-5)


def test_a_finished_run_resumed_is_left_as_it_is(tmp_path, capsys):
    run(tmp_path, "--stop-at", "3")
    before = [open(tmp_path / n, "rb").read() for n in ("ckpt.pt", "log.csv")]
    assert run(tmp_path, "--stop-at", "3", "--resume") == {} and "nothing left to do" in capsys.readouterr().out
    assert before == [open(tmp_path / n, "rb").read() for n in ("ckpt.pt", "log.csv")]


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def damage(path, how):
    content = bytearray(open(path, "rb").read())
    if how == "altered":
        content[len(content) // 2] ^= 255
    open(path, "wb").write({"cut short": content[:-5000], "empty": b"", "altered": content}[how])


@pytest.mark.parametrize("how", ["cut short", "empty", "altered"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, how):
    run(tmp_path / "whole")
    run(tmp_path / "a", "--stop-at", "4", "--save-every", "1", "--keep-every", "2")
    assert sorted(n for n in os.listdir(tmp_path / "a")) == ["args.json", "ckpt-2.pt", "ckpt-4.pt", "ckpt.prev.pt", "ckpt.pt", "log.csv"]
    assert [ckpt(tmp_path / "a", n)["step"] for n in ("ckpt-2.pt", "ckpt-4.pt", "ckpt.pt", "ckpt.prev.pt")] == [2, 4, 4, 3]
    os.remove(tmp_path / "a" / "ckpt-4.pt")
    damage(tmp_path / "a" / "ckpt.pt", how)
    capsys.readouterr()
    run(tmp_path / "a", "--resume")
    out = capsys.readouterr().out
    assert re.search(r"not used: \S+ckpt.pt: ", out) and "ckpt.prev.pt at step 3" in out
    assert os.path.exists(tmp_path / "a" / "ckpt.damaged.pt")  # and it never took the place of the good one
    assert not different(ckpt(tmp_path / "whole"), ckpt(tmp_path / "a")) and rows(tmp_path / "whole") == rows(tmp_path / "a")


def test_a_newer_kept_checkpoint_wins_over_the_previous(tmp_path, capsys):
    run(tmp_path, "--stop-at", "4", "--save-every", "1", "--keep-every", "4")
    damage(tmp_path / "ckpt.pt", "cut short")
    run(tmp_path, "--resume", "--stop-at", "5")
    assert "ckpt-4.pt at step 4" in capsys.readouterr().out


def test_other_versions_and_other_keys(tmp_path, capsys):
    run(tmp_path, "--stop-at", "2")
    good = ckpt(tmp_path)

    def resumed(**changes):
        torch.save({**good, **changes}, tmp_path / "ckpt.pt")
        return refused(capsys, tmp_path, "--resume")
    assert re.search(r"ckpt.pt is of version 9, and this code reads 1 to \d", resumed(version=9))
    keys = list(good["student"])
    renamed = {("new." + k if i < 7 else k): v for i, (k, v) in enumerate(good["student"].items())}
    text = resumed(student=renamed)
    assert f"student does not fit; missing: {', '.join(keys[:5])} and 2 more; unexpected: new.{keys[0]}, " in text
    assert f"of another shape: {keys[3]}" in resumed(student={**good["student"], keys[3]: torch.zeros(1)})
    assert "optimizer does not fit" in resumed(optimizer={"state": {}, "param_groups": []})
    assert "not a checkpoint of ours" in resumed() if good.pop("optimizer") else False
    torch.save({**{k: v for k, v in good.items() if k != "trail"}, "version": 1, "optimizer": ckpt_optimizer(tmp_path)}, tmp_path / "ckpt.pt")
    run(tmp_path, "--resume")
    assert "version 1" in capsys.readouterr().out


@pytest.mark.parametrize("begin", ["0", "0.5"])
def test_version_2_goes_on(tmp_path, begin):
    """A mixture without its floor, whose mu was the ring of waiting vectors before its start."""
    flags = ["--gmm-start", begin, "--num-prototypes", "32", "--var-floor", "0.9"]  # 16 vectors a step: two steps wait
    run(tmp_path / "whole", *flags)
    run(tmp_path / "a", *flags, "--stop-at", "3")
    old = ckpt(tmp_path / "a")
    assert old["prototypes"]["teacher"]["_extra_state"]["started"] == (begin == "0")
    del old["gmm"]["floor"]
    if begin != "0":
        old["gmm"]["S_mu"].fill_(7.)
    torch.save(old | {"version": 2}, tmp_path / "a" / "ckpt.pt")
    run(tmp_path / "a", *flags, "--resume")
    assert not different(ckpt(tmp_path / "whole"), ckpt(tmp_path / "a"))


def test_version_2_keeps_the_variances_that_lie_at_the_floor():
    gmm = OnlineGMM(4, 3, var_floor=0.5)
    h = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1, 0.1])
    gmm.init_from(h)
    for _ in range(20):
        gmm.update(h, 1.0, 0.01)
    assert 0 < (gmm.var == gmm.floor).sum() < 12
    old = {k: v for k, v in gmm.state_dict().items() if k != "floor"} | {"mu": gmm.mu, "var": gmm.var}
    state = folder.mixture({"version": 2, "gmm": old, "prototypes": {"teacher": {"_extra_state": {"started": True}}}})
    new = OnlineGMM(4, 3)
    new.load_state_dict({k.removeprefix("gmm."): v for k, v in state.items()})
    assert torch.equal(new.var, gmm.var) and torch.equal(new.mu, gmm.mu)


def ckpt_optimizer(tmp_path):
    run(tmp_path / "again", "--stop-at", "2")
    return ckpt(tmp_path / "again")["optimizer"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, capsys, dump):
    for flags in (["--resume"], ["--init", tmp_path / "a" / "ckpt.pt"]):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        os.makedirs(tmp_path / "a")
        with open(tmp_path / "a" / "ckpt.pt", "wb") as f:
            dump({"version": 2, "student": Evil(tmp_path / "ran")}, f)
        out = tmp_path / "a" if flags == ["--resume"] else tmp_path / "b"
        text = {pickle.dump: "cannot be read", torch.save: r"refused, it wants to build (posix|os).system.*nothing was run"}[dump]
        assert re.search(rf"a/ckpt.pt: {text}", refused(capsys, out, *flags))
        assert not os.path.exists(tmp_path / "ran")


# ---- disks -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size, name", [(100, "log.csv"), (2_000_000, "ckpt.pt")])
def test_disk_full(tmp_path, capsys, size, name):
    """A limit on the size of files: the write that passes it fails half-way, as on a full disk."""
    run(tmp_path, "--stop-at", "2")
    before = open(tmp_path / "ckpt.pt", "rb").read()
    assert len(before) > 2_000_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        text = refused(capsys, tmp_path, "--resume", "--stop-at", "3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert text == f"train.py: error: {tmp_path / name}: File too large; what was there before is untouched"
    assert open(tmp_path / "ckpt.pt", "rb").read() == before
    assert not [n for n in os.listdir(tmp_path) if n.endswith(".tmp") or n == "lock"]
    run(tmp_path, "--resume", "--stop-at", "3")


def test_no_space_left_while_a_row_is_written(tmp_path, capsys, monkeypatch):
    def full(self, step, values):
        raise OSError(errno.ENOSPC, "No space left on device", self.path)
    run(tmp_path, "--stop-at", "2")
    monkeypatch.setattr(folder.Log, "row", full)
    assert f"{tmp_path}/log.csv: No space left on device" in refused(capsys, tmp_path, "--resume")
    monkeypatch.undo()


def test_a_row_cut_short_by_a_kill_is_dropped(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "a", "--stop-at", "4")
    with open(tmp_path / "a" / "log.csv", "a") as f:
        f.write("4,0.1,9.")
    run(tmp_path / "a", "--resume")
    assert rows(tmp_path / "a") == rows(tmp_path / "whole")


def test_out_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    open(tmp_path / "file", "w").close()
    assert "Not a directory" in refused(capsys, tmp_path / "file" / "out")

    def read_only(path, **kw):
        raise OSError(errno.EROFS, "Read-only file system", path)
    monkeypatch.setattr(data, "load", None)  # said before the images are read
    monkeypatch.setattr(os, "makedirs", read_only)
    assert refused(capsys, tmp_path / "out") == f"train.py: error: {tmp_path / 'out'}: Read-only file system"


# ---- one run at a time -----------------------------------------------------------------------------------------------
def test_lock(tmp_path, capsys):
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner = {"host": socket.gethostname(), "pid": os.getppid(), "time": "2026-01-02 03:04:05"}
    for change, text in (({}, f"in use by process {os.getppid()} on {owner['host']} since 2026-01-02 03:04:05"),
                         ({"host": "elsewhere", "pid": gone.pid}, f"in use by process {gone.pid} on elsewhere")):
        json.dump(owner | change, open(tmp_path / "lock", "w"))
        assert text in refused(capsys, tmp_path) and json.load(open(tmp_path / "lock")) == owner | change
    json.dump(owner | {"pid": gone.pid}, open(tmp_path / "lock", "w"))
    run(tmp_path, "--stop-at", "1")
    assert f"process {gone.pid} of 2026-01-02 03:04:05 is gone" in capsys.readouterr().out
    assert not os.path.exists(tmp_path / "lock")


def test_lock_is_there_while_the_run_is(tmp_path, monkeypatch):
    seen = []
    at_step(monkeypatch, lambda terms: seen.append(json.load(open(tmp_path / "lock"))) or terms, 1)
    run(tmp_path, "--stop-at", "2")
    assert seen[0]["pid"] == os.getpid() and seen[0]["host"] == socket.gethostname() and time.strptime(seen[0]["time"], "%Y-%m-%d %H:%M:%S")


# ---- signals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, monkeypatch, number, code):
    run(tmp_path / "whole")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_step(patch, lambda terms: signal.raise_signal(number) or terms, 2)
        run(tmp_path / "a")
    assert stop.value.code == code and signal.getsignal(number) is before
    assert ckpt(tmp_path / "a")["step"] == 3 and not os.path.exists(tmp_path / "a" / "lock")
    run(tmp_path / "a", "--resume")
    assert not different(ckpt(tmp_path / "whole"), ckpt(tmp_path / "a")) and rows(tmp_path / "whole") == rows(tmp_path / "a")


def script(tmp_path, body):
    """A file that runs train.py with something done in the loss of a step, for a process of its own."""
    path = tmp_path / "script.py"
    path.write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {HERE!r})
import data, methods, train
data.IN_MEMORY = 0 if "--workers" in sys.argv else data.IN_MEMORY
real, RANK, LIFE = methods.CARPLoss.forward, int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
def forward(self, h_s, h_t, protos_s, protos_t, step):
    terms = real(self, h_s, h_t, protos_s, protos_t, step)
{body}
    return terms
methods.CARPLoss.forward = forward
train.main()
""")
    return str(path)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def test_signals_to_a_process(tmp_path):
    """SIGTERM to the whole group, workers included: code 143 and a checkpoint. A second SIGINT during a step that takes
    long: gone at once, nothing saved."""
    body = f"    open({str(tmp_path / 'busy')!r}, 'w').close() if step else None\n    time.sleep(float(os.environ['NAP']) if step else 0)"
    flags = [*TINY, "--steps", "1000", "--eval-every", "1000", "--data", make_folder(tmp_path / "set"), "--out", str(tmp_path / "a")]
    for numbers, code, nap, extra in (((signal.SIGTERM,), 143, "0.5", ["--workers", "1"]),
                                      ((signal.SIGINT, signal.SIGINT), -signal.SIGINT, "60", [])):
        with contextlib.suppress(FileNotFoundError):
            os.remove(tmp_path / "busy")
        process = subprocess.Popen([sys.executable, script(tmp_path, body), *flags, *extra, "--resume"], text=True,
                                   start_new_session=True, env={**environment(), "NAP": nap},
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            wait_for(tmp_path / "busy", process)
            os.killpg(process.pid, numbers[0])
            if len(numbers) > 1:
                time.sleep(1.2)
                process.send_signal(numbers[1])
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == code, err
        assert f"{numbers[0].name}: finishing this step, then saving" in err
        if code == 143:
            step = ckpt(tmp_path / "a")["step"]
            assert step in (2, 3) and f"step {step} is saved" in out
    assert ckpt(tmp_path / "a")["step"] == step
    assert "finishing" in err and os.path.exists(tmp_path / "a" / "lock")  # of a dead process: the next run takes it over


# ---- numbers that are not finite -------------------------------------------------------------------------------------
def nan(terms):
    return {**terms, "entropy": terms["entropy"] * float("nan")}


@pytest.mark.parametrize("prototypes", ["decoupled", "joint"])
@pytest.mark.parametrize("where", ["loss", "crops"])
def test_a_step_that_is_not_finite_is_named_and_skipped(tmp_path, monkeypatch, capsys, where, prototypes):
    """Step 3 leaves weights, optimiser, teacher and running averages as step 2 left them; NaN crops also the mixture."""
    flags = ["--prototypes", prototypes, "--warmup-epochs", "0", "--save-every", "1"]
    if where == "loss":
        at_step(monkeypatch, nan, 2)
    else:
        real = views.batches

        def batches(*args, start, stop, **kw):
            for step, crops in zip(range(start, stop), real(*args, start=start, stop=stop, **kw)):
                yield [c * float("nan") if step == 2 and stop == 6 else c for c in crops]
        monkeypatch.setattr(views, "batches", batches)
    run(tmp_path, *flags, "--keep-every", "1")
    two, three, four = (ckpt(tmp_path, f"ckpt-{n}.pt") for n in (2, 3, 4))
    still = ["student", "teacher", "loss"] + ["gmm", "prototypes"] * (where == "crops" or prototypes == "joint")
    changed = [k for k in different(two, three, *still) if "_extra_state" not in k]
    assert not changed
    state = {k: v for k, v in two["optimizer"]["state"].items()}
    assert not different({"x": state}, {"x": three["optimizer"]["state"]})
    assert len(different(three, four, "student")) > 20
    term = "entropy nan, loss nan (lr" if where == "loss" else "consistency nan, entropy nan, loss nan, grad_norm nan"
    assert f"step 3 is not finite: {term}" in capsys.readouterr().out
    log = rows(tmp_path)
    assert [r["skipped"] for r in log] == ["", "0", "1", "0"] and all(float(r["loss"]) == float(r["loss"]) for r in log[1:])


def test_three_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, nan, 1, 2, 4, 5, 6)
    text = refused(capsys, tmp_path, "--steps", "9", "--save-every", "1", "--warmup-epochs", "0")
    assert re.search(r"three steps in a row, up to 7, were skipped; step 5 is not finite: entropy nan, loss nan "
                     r"\(lr \S+, gradient norm \S+\). The last checkpoint is untouched", text)
    assert ckpt(tmp_path)["step"] == 6


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys):
    run(tmp_path, "--stop-at", "2")
    before = open(tmp_path / "ckpt.pt", "rb").read()
    real = optim.advance

    def advance(optimizer, finite):
        real(optimizer, finite)
        optimizer.param_groups[0]["params"][0].data.flatten()[0] = float("inf")
    monkeypatch.setattr(optim, "advance", advance)
    assert "step 3 is not saved: student.backbone" in refused(capsys, tmp_path, "--resume", "--save-every", "3")
    assert open(tmp_path / "ckpt.pt", "rb").read() == before


# ---- broken images ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_images(tmp_path, monkeypatch, capsys, in_memory):
    """0.5 %: named, and the run goes on; 2 %: the end."""
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
    run(tmp_path / "x", "--data", make_folder(tmp_path / "half", 400, broken=2, size=16), "--steps", "45", "--eval-every", "45")
    out = capsys.readouterr().out
    assert "a/5.png cannot be read; a neighbour stands in for it" in out and "b/6.png cannot be read" in out
    text = refused(capsys, tmp_path / "y", "--data", make_folder(tmp_path / "two", 400, broken=8, size=16), "--steps", "45", "--eval-every", "45")
    assert re.search(r"of 3\d\d images of two cannot be read, more than 1 %; the first is \S+\.png", text)


# ---- several processes -----------------------------------------------------------------------------------------------
def torchrun(path, *flags, restarts=0):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           f"--max_restarts={restarts}", path, *flags], text=True, timeout=120, capture_output=True, env=environment())
    return done.returncode, done.stdout + done.stderr


def test_two_processes(tmp_path, monkeypatch):
    """A run of one process goes on with two: NaN in one of them is skipped by both; a signal to one stops both at one
    step, and the restart by torchrun goes on; one is killed, the other notices, and the next restart ends at the same bits."""
    flags = [*TINY, "--data", make_folder(tmp_path / "set"), "--warmup-epochs", "0"]
    with monkeypatch.context() as patch:
        at_step(patch, nan, 3)
        train.main([*flags, "--out", str(tmp_path / "one")])
    for name in ("nan", "hard"):
        train.main([*flags, "--out", str(tmp_path / name), "--stop-at", "2"])
    body = "    if step == 3 and RANK == 1: terms['entropy'] = terms['entropy'] * float('nan')\n"
    code, text = torchrun(script(tmp_path, body), *flags, "--out", str(tmp_path / "nan"), "--resume")
    assert code == 0 and text.count("step 4 is not finite: entropy nan, loss nan (lr") == 1, text
    one, two = rows(tmp_path / "one"), rows(tmp_path / "nan")
    assert [r["skipped"] for r in two] == [r["skipped"] for r in one] == ["", "0", "1", "0"]
    for name in ("consistency", "entropy", "loss"):
        assert [float(r[name]) for r in two[1:]] == pytest.approx([float(r[name]) for r in one[1:]], rel=1e-3, abs=1e-5)

    body += "    if step == 4 and RANK == 1 and LIFE == 0: os.kill(os.getpid(), signal.SIGTERM)\n"
    body += "    if step == 5 and RANK == 1 and LIFE == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
    code, text = torchrun(script(tmp_path, body), *flags, "--out", str(tmp_path / "hard"), "--resume", restarts=2)
    assert code == 0 and "step 5 is saved" in text and text.count("ckpt.pt at step 5") == 2, text
    assert "process 0 lost its connection to another one and leaves; the last checkpoint is whole" in text, text
    assert not different(ckpt(tmp_path / "nan"), ckpt(tmp_path / "hard"))


def test_a_restart_by_torchrun_implies_resume(tmp_path, monkeypatch, capsys):
    run(tmp_path, "--stop-at", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "already holds a run" in refused(capsys, tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(tmp_path, "--stop-at", "3")
    assert "ckpt.pt at step 2" in capsys.readouterr().out


# ---- backbones in and out --------------------------------------------------------------------------------------------
VIT = ["--arch", "vit_tiny", "--patch-size", "8", "--steps", "1"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_goes_into_timm_and_back(tmp_path, capsys, suffix):
    timm = pytest.importorskip("timm")
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    from support import checkpoints
    run(tmp_path / "a", *VIT)
    file = tmp_path / f"backbone{suffix}"
    train.main(["--export", str(file), "--out", str(tmp_path / "a")])
    net = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=12, num_heads=3, num_classes=0)
    net.load_state_dict(checkpoints.read(file))  # strict
    mine = models.build("vit_tiny", patch_size=8, img_size=32)
    weights.init(file, [mine])
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(net.eval()(x), mine.eval()(x)[0], atol=1e-5)
    teacher = {k[9:]: v for k, v in ckpt(tmp_path / "a")["teacher"].items() if k.startswith("backbone.")}
    assert not different({"x": teacher}, {"x": mine.state_dict()})
    assert "150 of 150 tensors matched; missing: none" in capsys.readouterr().out
    run(tmp_path / "b", *VIT, "--init", file)  # its only step has learning rate 0
    assert "150 of 150 tensors matched" in capsys.readouterr().out
    saved = ckpt(tmp_path / "b")
    assert all(torch.equal(saved[net][f"backbone.{k}"], v) for k, v in teacher.items() for net in ("student", "teacher"))
    with pytest.raises(SystemExit):
        train.main(["--export", str(file), "--out", str(tmp_path / "a")])
    assert "exists already" in capsys.readouterr().err


def test_init_reads_what_people_release(tmp_path, capsys):
    other = models.build("vit_nano", patch_size=8, img_size=32).state_dict()
    dino = {side: {f"module.backbone.{k}": v + i for k, v in other.items()} | {"module.head.mlp.0.weight": torch.zeros(3)}
            for i, side in enumerate(("student", "teacher"))}
    timm = {**other, "head.weight": torch.zeros(10, 96), "head.bias": torch.zeros(10)}
    for name, stored, off, text in (("dino", dino, 1, "not used: head.mlp.0.weight"), ("timm", timm, 0, "not used: head.weight, head.bias"),
                                    ("run", {"version": 2, "teacher": {f"backbone.{k}": v for k, v in other.items()}}, 0, "not used: none")):
        torch.save(stored, tmp_path / f"{name}.pth")
        net = models.build("vit_nano", patch_size=8, img_size=32)
        weights.init(tmp_path / f"{name}.pth", [net])
        assert not different({"x": {k: v + off for k, v in other.items()}}, {"x": net.state_dict()})
        assert f"matched; missing: none; of another shape: none; {text}" in capsys.readouterr().out


def test_init_names_what_does_not_fit(tmp_path, capsys):
    other = models.build("vit_nano", patch_size=8, img_size=64).state_dict()
    other["norm.weight"] = torch.ones(7)
    del other["norm.bias"]
    torch.save(other, tmp_path / "x.pth")
    net = models.build("vit_nano", patch_size=8, img_size=32)
    weights.init(tmp_path / "x.pth", [net])
    assert "missing: norm.bias; of another shape: norm.weight (7,) for (96,); not used: none" in capsys.readouterr().out
    assert torch.equal(net.state_dict()["pos_embed"][:, 0], other["pos_embed"][:, 0])  # the grid is interpolated
    grid = other["pos_embed"][0, 1:].reshape(8, 8, 96)
    assert (net.state_dict()["pos_embed"][0, 1:].mean(0) - grid.mean((0, 1))).abs().max() < 0.02
    torch.save({"a": torch.zeros(3)}, tmp_path / "y.pth")
    assert "nothing in it matches this --arch; its keys: a; wanted: cls_token" in refused(capsys, tmp_path / "o", "--init", tmp_path / "y.pth")
    assert "no such file" in refused(capsys, tmp_path / "o", "--init", tmp_path / "z.pth")
