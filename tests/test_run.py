"""What a run survives: stops, signals, full disks, damaged and foreign files, numbers like NaN."""
import contextlib
import errno
import io
import json
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import data
import forked
import losses
import models
import train
import views
from conftest import (ROOT, TINY, differences, make_folder, read_checkpoint, read_log,
                      sentence_of_refusal, train_tiny, use_small_network, use_small_shapes)
from support import ddp, files, runs
from support.log import Log
from support.optim import CheckedStep

pytestmark = pytest.mark.usefixtures("small_shapes", "small_network")


def at_steps(monkeypatch, change, *steps):
    """The terms of the loss become change(terms) at the given steps, counted from 0."""
    forward = losses.CARPLoss.forward

    def changed(self, h_s, h_t, protos_s, protos_t, step):
        terms = forward(self, h_s, h_t, protos_s, protos_t, step)
        return change(terms) if step in steps else terms
    monkeypatch.setattr(losses.CARPLoss, "forward", changed)


@contextlib.contextmanager
def case(*of_a_loop):
    """What fails in it says in which case."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f"in the case {of_a_loop}") from error


def with_nan(terms):
    return {**terms, "entropy": terms["entropy"] * float("nan")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed, which tests read and leave as it is."""
    out = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        use_small_shapes(patch)
        use_small_network(patch)
        train_tiny(out)
    return out


# ---- exact resume ------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [
    ["--prototypes", "decoupled", "--accum", "2"],
    ["--prototypes", "joint", "--accum", "4"],
    ["--prototypes", "decoupled", "--workers", "1", "--drop-path", "0.5"]])
def test_stopped_anywhere_and_resumed_is_the_same_to_the_bit(tmp_path, monkeypatch, flags):
    """Weights, optimiser, mixture and log, also where a run stops between two rows of the log.

    With accumulation, and with processes that decode images.
    """
    if "--workers" in flags:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
        flags = [*flags, "--data", make_folder(tmp_path / "set", 40)]
    flags = [*flags, "--save-every", "1"]
    train_tiny(tmp_path / "whole", *flags)
    for step in (1, 3, 6):
        train_tiny(tmp_path / "parts", *flags, "--stop-at", step, "--resume")
    whole, parts = (read_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert not differences(whole, parts)
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts")
    whole, parts = ((tmp_path / name / "log.csv").open().readline() for name in ("whole", "parts"))
    assert whole == parts  # the columns in their order
    assert [row["step"] for row in read_log(tmp_path / "whole")] == ["0", "2", "4", "6"]


def test_a_row_is_the_mean_of_its_steps(tmp_path):
    train_tiny(tmp_path / "each", "--head-norm", "--log-every", "1", "--stop-at", "2")
    train_tiny(tmp_path / "pairs", "--head-norm")
    each, pairs = read_log(tmp_path / "each"), read_log(tmp_path / "pairs")
    for name in ("loss", "grad_norm", "entropy"):
        mean = (float(each[1][name]) + float(each[2][name])) / 2
        assert float(pairs[1][name]) == pytest.approx(mean, rel=1e-5)


def test_a_finished_run_resumed_is_left_as_it_is(tmp_path, capsys):
    train_tiny(tmp_path, "--stop-at", "3")
    before = [(tmp_path / name).read_bytes() for name in ("ckpt.pt", "log.csv")]
    assert train_tiny(tmp_path, "--stop-at", "3", "--resume") == {}
    assert "nothing left to do" in capsys.readouterr().out
    assert [(tmp_path / name).read_bytes() for name in ("ckpt.pt", "log.csv")] == before


# ---- checkpoints -------------------------------------------------------------------------------
def damage(path, how):
    content = path.read_bytes()
    if how == "cut short":
        content = content[:-5000]
    elif how == "empty":
        content = b""
    elif how == "altered":
        weights = max(read_checkpoint(path.parent, path.name)["student"].values(), key=torch.numel)
        place = content.index(weights.numpy().tobytes())  # between tensors no checksum looks
        content = content[:place] + bytes([content[place] ^ 255]) + content[place + 1:]
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut short", "empty", "altered"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, whole, how):
    out = tmp_path / "damaged"
    train_tiny(out, "--stop-at", "4", "--save-every", "1", "--keep-every", "2")
    steps = {"ckpt-2.pt": 2, "ckpt-4.pt": 4, "ckpt.prev.pt": 3, "ckpt.pt": 4}
    assert sorted(os.listdir(out)) == sorted(["args.json", "log.csv", *steps])
    assert {name: read_checkpoint(out, name)["step"] for name in steps} == steps
    os.remove(out / "ckpt-4.pt")
    damage(out / "ckpt.pt", how)
    os.utime(out / "ckpt-2.pt")  # as if the folder had been copied, and this file last
    capsys.readouterr()
    train_tiny(out, "--resume")
    printed = capsys.readouterr().out
    assert re.search(r"not used: \S+ckpt.pt: ", printed)
    assert "ckpt.prev.pt at step 3" in printed
    assert os.path.exists(out / "ckpt.damaged.pt")  # it never took the place of the good one
    assert not differences(read_checkpoint(whole), read_checkpoint(out))
    assert read_log(whole) == read_log(out)


def test_a_newer_kept_checkpoint_wins_over_the_previous(tmp_path, capsys):
    train_tiny(tmp_path, "--stop-at", "4", "--save-every", "1", "--keep-every", "4")
    damage(tmp_path / "ckpt.pt", "cut short")
    train_tiny(tmp_path, "--resume", "--stop-at", "5")
    assert "ckpt-4.pt at step 4" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_fit_is_refused_and_says_why(tmp_path, capsys):
    train_tiny(tmp_path, "--stop-at", "2")
    good = read_checkpoint(tmp_path)

    def refusal(**changes):
        torch.save({**good, **changes}, tmp_path / "ckpt.pt")
        return sentence_of_refusal(capsys, tmp_path, "--resume")

    assert re.search(r"ckpt.pt is of version 9, and this code reads version \d", refusal(version=9))
    names = list(good["student"])
    renamed = {f"new.{name}" if i < 7 else name: value
               for i, (name, value) in enumerate(good["student"].items())}
    missing = ", ".join(f'"{name}"' for name in names[:3])
    assert re.search(rf"ckpt.pt: student does not fit \(.*Missing key.*: {missing}, ",
                     refusal(student=renamed))
    other_shape = {**good["student"], names[3]: torch.zeros(1)}
    assert re.search(rf"student does not fit \(.*size mismatch for {names[3]}.*shape",
                     refusal(student=other_shape))
    no_tensor = {**good["student"], names[3]: 3}
    assert re.search(rf"student does not fit \(.*{names[3]}", refusal(student=no_tensor))
    no_state = {**good["prototypes"]["teacher"], "_extra_state": 3}
    assert "prototypes.teacher does not fit" in refusal(
        prototypes={**good["prototypes"], "teacher": no_state})
    for optimizer in ({"state": {}, "param_groups": []}, {**good["optimizer"], "state": 3}):
        assert "optimizer does not fit" in refusal(optimizer=optimizer)
    del good["optimizer"]
    assert "not a checkpoint of ours" in refusal()


def test_a_checkpoint_that_names_no_script_goes_on(tmp_path, whole):
    """Older runs do not say which script made them, in their checkpoint or in args.json."""
    out = tmp_path / "parts"
    train_tiny(out, "--stop-at", "3")
    ckpt = read_checkpoint(out)
    assert ckpt["args"].pop("script") == "train.py"
    torch.save(ckpt, out / "ckpt.pt")
    about = json.loads((out / "args.json").read_text())
    del about["script"]
    (out / "args.json").write_text(json.dumps(about))
    train_tiny(out, "--resume")
    assert not differences(read_checkpoint(whole), read_checkpoint(out))
    assert read_log(whole) == read_log(out)
    assert read_checkpoint(out)["args"]["script"] == "train.py"


def test_a_run_on_other_built_in_images_is_refused(tmp_path, capsys):
    train_tiny(tmp_path, "--stop-at", "2")
    ckpt = read_checkpoint(tmp_path)
    assert ckpt["args"].pop("data_version") == data.VERSIONS["shapes"]
    torch.save(ckpt, tmp_path / "ckpt.pt")  # as a run of before is, which notes no version
    with pytest.raises(SystemExit) as stop:
        train_tiny(tmp_path, "--resume")
    assert stop.value.code == 2
    assert "trained on version 1 of the images --data shapes" in capsys.readouterr().err


def test_a_checkpoint_of_a_later_version_is_not_evaluated(tmp_path):
    train_tiny(tmp_path, "--stop-at", "1")
    torch.save(read_checkpoint(tmp_path) | {"version": 9}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"is of version 9, and this code reads version \d"):
        runs.load_run(str(tmp_path))


def test_a_checkpoint_that_the_code_does_not_fit_says_why(tmp_path):
    train_tiny(tmp_path, "--stop-at", "1")
    ckpt = read_checkpoint(tmp_path)
    ckpt["teacher"]["head.mlp.0.weight"] = torch.zeros(3, 3)
    torch.save(ckpt, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"was made by other code, or is damaged \(RuntimeError: .*"
                                         r"head\.mlp\.0\.weight"):
        runs.load_run(str(tmp_path))


# ---- other images ------------------------------------------------------------------------------
def stopped_run(tmp_path):
    """Train 3 of 6 steps in tmp_path/out, on a folder of images that is returned."""
    images = make_folder(tmp_path / "set", 24, size=16)
    train_tiny(tmp_path / "out", "--data", images, "--stop-at", "3")
    return images


def test_a_moved_folder_resumes_to_the_bit(tmp_path):
    images = stopped_run(tmp_path)
    train_tiny(tmp_path / "whole", "--data", images)
    os.rename(images, tmp_path / "renamed")
    train_tiny(tmp_path / "out", "--resume", "--data", tmp_path / "renamed")
    assert not differences(read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "out"))


def test_resume_refuses_other_images(tmp_path, capsys):
    images = stopped_run(tmp_path)
    before = (tmp_path / "out/ckpt.pt").read_bytes()

    def says(*words, data):
        sentence = sentence_of_refusal(capsys, tmp_path / "out", "--resume", "--data", data)
        for word in (f"trained on other images than --data {data} holds now: ", *words):
            assert word in sentence, sentence
    others = make_folder(tmp_path / "others", 40, size=16)
    says("images 22 -> 36", "other names of files", data=others)
    says("set folder -> shapes", data="shapes")
    os.rename(os.path.join(images, "a", "3.png"), os.path.join(images, "a", "3b.png"))
    says("other names of files", data=images)  # one file has another name
    os.rename(os.path.join(images, "a", "3b.png"), os.path.join(images, "a", "3.png"))
    os.rename(os.path.join(images, "a"), os.path.join(images, "c"))
    says("labels or names of classes", data=images)  # one class has another name
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before


def test_resume_refuses_when_passes_would_be_longer(tmp_path, capsys):
    """With --epochs more images are more steps, and every schedule would be stretched."""
    images = make_folder(tmp_path / "set", 24, size=16)
    tiny = TINY[:TINY.index("--steps")] + TINY[TINY.index("--steps") + 2:]
    train.main([*tiny, "--data", images, "--out", str(tmp_path / "out"), "--epochs", "3",
                "--stop-at", "3"])
    for i in range(100, 120):
        os.link(os.path.join(images, "a", "1.png"), os.path.join(images, "a", f"{i}.png"))
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path / "out"), "--resume"])
    assert stop.value.code == 2
    assert "images 22 -> 40" in (said := capsys.readouterr().err) and "steps 6 -> 15" in said


def test_a_checkpoint_with_parts_of_other_types_is_one_sentence(tmp_path, capsys):
    train_tiny(tmp_path, "--stop-at", "2", "--data", "shapes")
    good = read_checkpoint(tmp_path)
    for key, value in (("gmm", None), ("prototypes", None), ("prototypes", {"teacher": {}}),
                       ("args", ["x"]), ("step", "3"), ("step", float("nan")), ("teacher", []),
                       ("trail", "x"), ("optimizer", None)):
        torch.save(good | {key: value}, tmp_path / "ckpt.pt")
        with case(key, value):
            sentence = sentence_of_refusal(capsys, tmp_path, "--resume")
            assert f"ckpt.pt: not a checkpoint of ours, or a damaged one: {key}" in sentence


def test_resume_names_the_flag_that_changes_the_number_of_steps(tmp_path, capsys):
    stopped_run(tmp_path)
    sentence = sentence_of_refusal(capsys, tmp_path / "out", "--resume", "--steps", "9")
    assert sentence.endswith("was made with other flags: --steps 6 -> 9")


def test_a_checkpoint_from_before_the_images_were_remembered(tmp_path, capsys):
    stopped_run(tmp_path)
    old = read_checkpoint(tmp_path / "out")
    del old["args"]["data_seen"]
    torch.save(old, tmp_path / "out/ckpt.pt")
    train_tiny(tmp_path / "out", "--resume")
    assert "does not say which images it saw" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "out")["step"] == 6


class Hostile:
    """Unpickled, it runs a command that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("flag", ["--resume", "--init"])
@pytest.mark.parametrize("dump, reason", [
    (pickle.dump, "refused, it is a pickle that torch.save did not write"),
    (torch.save, r"refused, it wants to build (posix|os).system.*nothing was run")])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, capsys, dump, reason, flag):
    os.makedirs(tmp_path / "a")
    path = tmp_path / "a" / "ckpt.pt"
    with open(path, "wb") as file:
        dump({"version": 2, "student": Hostile(tmp_path / "created")}, file)
    if flag == "--resume":
        sentence = sentence_of_refusal(capsys, tmp_path / "a", "--resume")
    else:
        sentence = sentence_of_refusal(capsys, tmp_path / "b", "--init", path)
    assert re.search(f"a/ckpt.pt: {reason}", sentence)
    assert not os.path.exists(tmp_path / "created")


# ---- disks -------------------------------------------------------------------------------------
@contextlib.contextmanager
def largest_file(size):
    """A write that makes a file larger than `size` bytes fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size, name", [(100, "log.csv"), (300_000, "ckpt.pt")])
def test_a_full_disk(tmp_path, capsys, size, name):
    train_tiny(tmp_path, "--stop-at", "2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert len(before) > 300_000
    with largest_file(size):
        sentence = sentence_of_refusal(capsys, tmp_path, "--resume", "--stop-at", "3")
    assert sentence == (f"train.py: error: {tmp_path / name}: File too large; what was there "
                        "before is untouched")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    unfinished = [file for file in os.listdir(tmp_path) if file.endswith(".tmp")]
    assert not unfinished
    assert not os.path.exists(tmp_path / "lock")
    train_tiny(tmp_path, "--resume", "--stop-at", "3")


def test_no_space_left_while_a_row_is_written(tmp_path, capsys, monkeypatch):
    def full(self, step, values, terms=()):
        raise OSError(errno.ENOSPC, "No space left on device", self.path)
    train_tiny(tmp_path, "--stop-at", "2")
    monkeypatch.setattr(Log, "row", full)
    sentence = sentence_of_refusal(capsys, tmp_path, "--resume")
    assert f"{tmp_path}/log.csv: No space left on device" in sentence


def test_a_row_cut_short_by_a_kill_is_dropped(tmp_path, whole):
    train_tiny(tmp_path, "--stop-at", "4")
    with open(tmp_path / "log.csv", "a") as file:
        file.write("4,0.1,9.")
    train_tiny(tmp_path, "--resume")
    assert read_log(tmp_path) == read_log(whole)


def test_out_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert "Not a directory" in sentence_of_refusal(capsys, tmp_path / "file" / "out")

    def read_only(path, **settings):
        raise OSError(errno.EROFS, "Read-only file system", path)
    monkeypatch.setattr(data, "load", None)  # the refusal comes before the images are read
    monkeypatch.setattr(os, "makedirs", read_only)
    sentence = sentence_of_refusal(capsys, tmp_path / "out")
    assert sentence == f"train.py: error: {tmp_path / 'out'}: Read-only file system"


# ---- one run at a time -------------------------------------------------------------------------
SINCE = "2026-01-02 03:04:05"


def process_that_ended():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def write_lock(out, host, pid):
    text = json.dumps({"host": host, "pid": pid, "time": SINCE})
    (out / "lock").write_text(text)
    return text


def test_a_warm_up_that_is_cut_says_so(tmp_path, capsys):
    train_tiny(tmp_path, "--warmup-epochs", "2", "--stop-at", "1")
    assert ("warm-up of lr: 0.6 steps, a tenth of the run, as --warmup-epochs 2 is longer"
            in capsys.readouterr().out)
    train_tiny(tmp_path, "--stop-at", "2", "--resume")
    assert "as --warmup-epochs 2 is longer" in capsys.readouterr().out


def test_a_mixture_that_would_never_start_is_refused(tmp_path, capsys):
    assert ("--gmm-start 6 lies beyond the 6 steps of this run: the prototypes would never move"
            in sentence_of_refusal(capsys, tmp_path, "--gmm-start", "6"))
    assert "--gmm-start 6 lies beyond" in sentence_of_refusal(
        capsys, tmp_path, "--gmm-start", "6", "--resume")  # of a run that has yet to begin


@pytest.mark.parametrize("owner", ["a process that lives", "a process elsewhere"])
def test_a_folder_in_use_is_refused(tmp_path, capsys, owner):
    host, pid = socket.gethostname(), os.getppid()
    if owner == "a process elsewhere":  # whose life nobody here can tell
        host, pid = "elsewhere", process_that_ended()
    lock = write_lock(tmp_path, host, pid)
    sentence = sentence_of_refusal(capsys, tmp_path)
    assert f"in use by process {pid} on {host} since {SINCE}" in sentence
    assert (tmp_path / "lock").read_text() == lock


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "\xff", '{"host": "HOST"}',
                                  '{"host": "HOST", "pid": "x"}', '{"host": "HOST", "pid": 0}'])
def test_a_folder_with_a_damaged_lock_is_refused(text, tmp_path, capsys):
    (tmp_path / "lock").write_text(text.replace("HOST", socket.gethostname()))
    assert f"delete {tmp_path / 'lock'}" in sentence_of_refusal(capsys, tmp_path)
    assert os.listdir(tmp_path) == ["lock"]


def test_a_full_disk_leaves_no_lock_that_belongs_to_nobody(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(path, mode):
        open(path, mode).close()
        return Full()
    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"), files.locked(tmp_path):
        pass
    assert not os.listdir(tmp_path)


def test_a_damaged_log_is_named_and_stays(tmp_path, capsys):
    train_tiny(tmp_path, "--stop-at", "4")
    log = tmp_path / "log.csv"
    good = log.read_bytes()
    for old, new in ((b"step,", b"stop,"), (b"\n2,", b"\nx,"), (b"\n2,", b"\n2,\xff"),
                     (b"\n2,", b"\n2,x"), (b"\n2,", b"\n2" + 99 * b",1")):
        damaged = good.replace(old, new, 1)
        log.write_bytes(damaged)
        with case(old, new):
            assert damaged != good
            sentence = sentence_of_refusal(capsys, tmp_path, "--resume")
            assert f"{log} is damaged; move it away" in sentence
            assert log.read_bytes() == damaged
    os.remove(log)
    train_tiny(tmp_path, "--resume")
    assert read_log(tmp_path)[-1]["step"] == "6"


def test_a_run_that_diverges_without_a_loss_that_shows_it_is_one_sentence(tmp_path, capsys):
    # the first step has a learning rate of 0, and the second one makes each weight 1e14 times as
    # large, after its loss was taken: three layers of the head then overflow on any processor
    sentence = sentence_of_refusal(
        capsys, tmp_path, "--weight-decay", "4e9", "--lr", "1e6", "--no-head-bn", "--momentum", "0",
        "--momentum-end", "0", "--steps", "2", "--eval-every", "2")
    assert "not finite" in sentence and "lower --lr" in sentence


def test_a_number_that_no_process_can_have_is_of_a_dead_one(tmp_path, capsys):
    write_lock(tmp_path, socket.gethostname(), 10 ** 30)
    train_tiny(tmp_path, "--stop-at", "1")
    assert f"process {10 ** 30} of {SINCE} is gone" in capsys.readouterr().out


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, capsys):
    pid = process_that_ended()
    write_lock(tmp_path, socket.gethostname(), pid)
    train_tiny(tmp_path, "--stop-at", "1")
    assert f"process {pid} of {SINCE} is gone" in capsys.readouterr().out
    assert not os.path.exists(tmp_path / "lock")


def test_the_lock_is_there_while_the_run_is(tmp_path, monkeypatch):
    locks = []

    def read_lock(terms):
        locks.append(json.loads((tmp_path / "lock").read_text()))
        return terms
    at_steps(monkeypatch, read_lock, 1)
    train_tiny(tmp_path, "--stop-at", "2")
    assert len(locks) == 1
    assert locks[0]["pid"] == os.getpid()
    assert locks[0]["host"] == socket.gethostname()
    assert time.strptime(locks[0]["time"], "%Y-%m-%d %H:%M:%S")
    assert not os.path.exists(tmp_path / "lock")


# ---- signals -----------------------------------------------------------------------------------
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, monkeypatch, whole, number, code):
    def send(terms):
        signal.raise_signal(number)
        return terms
    handler = signal.getsignal(number)
    out = tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_steps(patch, send, 2)
        train_tiny(out)
    assert stop.value.code == code
    assert signal.getsignal(number) is handler
    assert read_checkpoint(out)["step"] == 3
    assert not os.path.exists(out / "lock")
    train_tiny(out, "--resume")
    assert not differences(read_checkpoint(whole), read_checkpoint(out))
    assert read_log(whole) == read_log(out)


SCRIPT = """
import os, signal, sys, time
if "--own-group" in sys.argv:
    sys.argv.remove("--own-group")
    os.setsid()
sys.path.insert(0, {root!r})
import data, losses, models, train

models.VITS.update({networks!r})  # those of the test
RANK = int(os.environ.get("RANK", 0))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
if "--workers" in sys.argv:
    data.IN_MEMORY = 0
forward = losses.CARPLoss.forward

def changed(self, h_s, h_t, protos_s, protos_t, step):
    terms = forward(self, h_s, h_t, protos_s, protos_t, step)
{lines}
    return terms

losses.CARPLoss.forward = changed
{before}
train.main()
"""


def write_script(tmp_path, *lines, before=""):
    """A script that runs train.py and `lines` after the loss of every step, and `before` before."""
    path = tmp_path / "script.py"
    lines = "\n".join(f"    {line}" for line in lines)
    path.write_text(SCRIPT.format(root=ROOT, networks=models.VITS, lines=lines,
                                  before=before))
    return str(path)


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        assert process.exitcode is None, "the process ended"
        assert time.monotonic() < end
        time.sleep(0.02)


def signal_to_a_group(tmp_path, numbers, seconds, *flags):
    """(exit code, stdout, stderr) of a run that gets these signals in its second step.

    The first signal goes to the whole group of processes, twice, as a terminal and a launcher may
    pass on the same one; the next signal goes to the run alone. Each step from the second one on
    takes `seconds` longer than it needs.
    """
    busy = tmp_path / "busy"
    script = write_script(tmp_path, "if step > 0:", f"    open({str(busy)!r}, 'w').close()",
                          f"    time.sleep({seconds})")
    started = forked.Started([sys.executable, script, "--own-group", *TINY, "--steps", "1000",
                              "--eval-every", "1000", *flags], env=environment())
    process = started.process
    try:
        wait_for(busy, process)
        os.killpg(process.pid, numbers[0])
        time.sleep(0.1)
        os.killpg(process.pid, numbers[0])
        for number in numbers[1:]:
            time.sleep(1.2)  # within a second it would count as the first
            os.kill(process.pid, number)
        done = started.finish(30)
    finally:
        process.kill()
    os.remove(busy)
    return done.returncode, done.stdout, done.stderr


def test_signals_to_a_process(tmp_path):
    """SIGTERM to the whole group, decoding processes included: exit code 143 and a checkpoint.

    A second SIGINT during a long step: the run is gone at once, and nothing is saved.
    """
    flags = ["--data", make_folder(tmp_path / "set"), "--out", str(tmp_path / "out"), "--resume"]
    code, printed, errors = signal_to_a_group(tmp_path, [signal.SIGTERM], 0.5, *flags,
                                              "--workers", "1")
    assert code == 143, errors
    assert errors.count("SIGTERM: finishing this step, then saving") == 1
    step = read_checkpoint(tmp_path / "out")["step"]
    assert step in (2, 3)
    assert f"step {step} is saved" in printed

    code, printed, errors = signal_to_a_group(tmp_path, [signal.SIGINT, signal.SIGINT], 60, *flags)
    assert code == -signal.SIGINT, errors
    assert "SIGINT: finishing this step, then saving" in errors
    assert read_checkpoint(tmp_path / "out")["step"] == step
    assert os.path.exists(tmp_path / "out" / "lock")  # the next run takes it over


# ---- numbers that are not finite ---------------------------------------------------------------
def nan_crops_at(monkeypatch, skipped):
    """All crops of the training step `skipped`, counted from 0, are NaN."""
    batches = views.batches

    def changed(*args, start, stop, **settings):
        training = settings.get("recipe", args[1]).n_local > 0  # an evaluation has no local crops
        for step, crops in enumerate(batches(*args, start=start, stop=stop, **settings), start):
            yield [x * float("nan") if training and step == skipped else x for x in crops]
    monkeypatch.setattr(views, "batches", changed)


@pytest.mark.parametrize("prototypes", ["decoupled", "joint"])
@pytest.mark.parametrize("where", ["loss", "crops"])
def test_a_step_that_is_not_finite_is_named_and_skipped(tmp_path, monkeypatch, capsys, where,
                                                        prototypes):
    """Step 3 leaves weights, optimiser, teacher and running averages as step 2 left them.

    A mixture moves on if only the loss is NaN; vectors that are NaN leave it as it was too.
    """
    if where == "loss":
        at_steps(monkeypatch, with_nan, 2)
        terms = "entropy nan, loss nan, grad_norm nan (lr"
    else:
        nan_crops_at(monkeypatch, 2)
        terms = "consistency nan, entropy nan, loss nan, grad_norm nan"
    train_tiny(tmp_path, "--prototypes", prototypes, "--warmup-epochs", "0", "--save-every", "1",
               "--keep-every", "1")
    two, three, four = (read_checkpoint(tmp_path, f"ckpt-{step}.pt") for step in (2, 3, 4))
    parts = ["student", "teacher", "loss"]
    if where == "crops" or prototypes == "joint":
        parts += ["gmm", "prototypes"]
    changed = differences(two, three, *parts)
    assert not [path for path in changed if "_extra_state" not in path]
    states = [{"state": ckpt["optimizer"]["state"]} for ckpt in (two, three)]
    assert not differences(*states)
    assert len(differences(three, four, "student")) > 20
    assert f"step 3 is not finite: {terms}" in capsys.readouterr().out
    log = read_log(tmp_path)
    assert [row["skipped"] for row in log] == ["", "0", "1", "0"]
    assert all(float(row["loss"]) == float(row["loss"]) for row in log[1:])  # none is NaN


def test_three_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    at_steps(monkeypatch, with_nan, 1, 2, 4, 5, 6)
    sentence = sentence_of_refusal(capsys, tmp_path, "--steps", "9", "--save-every", "1",
                                   "--warmup-epochs", "0")
    assert re.search("three steps in a row, up to 7, were skipped; step 5 is not finite: entropy "
                     r"nan, loss nan, grad_norm nan \(lr \S+, gradient norm nan\). The last "
                     "checkpoint is untouched", sentence)
    assert read_checkpoint(tmp_path)["step"] == 6


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys):
    train_tiny(tmp_path, "--stop-at", "2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    take_step = CheckedStep.__call__

    def to_infinity(self, *args):
        outcome = take_step(self, *args)
        self.params[0].data.view(-1)[0] = float("inf")
        return outcome
    monkeypatch.setattr(CheckedStep, "__call__", to_infinity)
    sentence = sentence_of_refusal(capsys, tmp_path, "--resume", "--save-every", "3")
    assert "step 3 is not saved: student.backbone" in sentence
    assert (tmp_path / "ckpt.pt").read_bytes() == before


# ---- broken images -----------------------------------------------------------------------------
@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_images(tmp_path, monkeypatch, capsys, in_memory):
    """One of 40 is named, and the run goes on; four end it. The share itself is in test_data.py."""
    if not in_memory:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
    flags = ["--batch-size", "6", "--steps", "6"]  # every image of the 36 for training once
    one = make_folder(tmp_path / "one", 40, broken=1, size=16)
    train_tiny(tmp_path / "out", *flags, "--data", one)
    printed = capsys.readouterr().err
    assert re.search(r"a/5.png cannot be read \(.+\); a neighbour stands in for it", printed)
    four = make_folder(tmp_path / "four", 40, broken=4, size=16)
    sentence = sentence_of_refusal(capsys, tmp_path / "other", *flags, "--data", four)
    assert re.search(r"of 36 images of four cannot be read, more than 1 %: \S+\.png cannot be "
                     r"read \(.+\)", sentence)


def test_a_decoding_process_that_is_killed_ends_the_run_with_a_sentence(tmp_path, monkeypatch,
                                                                        capsys):
    """As the kernel kills one for lack of memory; the run goes on from its last step."""
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    flags = ["--data", make_folder(tmp_path / "set"), "--save-every", "1"]
    original = views.Crops.__getitem__

    def killed_at_step_3(crops, key):
        if key[1] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(crops, key)
    with monkeypatch.context() as patch:
        patch.setattr(views.Crops, "__getitem__", killed_at_step_3)
        with pytest.raises(SystemExit) as stop:
            train_tiny(tmp_path / "out", *flags, "--workers", "1")
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert "train.py: error: a process that decodes images (--workers) was ended" in printed
    assert 1 <= read_checkpoint(tmp_path / "out")["step"] <= 3
    train_tiny(tmp_path / "out", "--resume", *flags)
    assert read_checkpoint(tmp_path / "out")["step"] == 6


# ---- several processes -------------------------------------------------------------------------
def torchrun(script, *flags, restarts=0):
    """(exit code, all that was printed) of a script on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"--max_restarts={restarts}", script, *flags]
    done = forked.run(command, timeout=120, capture_output=True, env=environment())
    return done.returncode, done.stdout + done.stderr


UNDISTURBED = """
if RESTARTS == 1:  # in processes that are there anyway, as to start two more takes long
    from support import ddp
    leave_group = ddp.cleanup
    ddp.cleanup = lambda: None
    train.main({flags!r})
    ddp.cleanup = leave_group
"""


def test_two_processes(tmp_path, monkeypatch):
    """A run that one process began goes on with two, through NaN, a signal and a kill.

    NaN in one of them is skipped by both. A signal to one stops both at the same step. Started
    again, one is killed, the other notices, and those that torchrun starts in their place end at
    the same bits as a run of two processes that met with NaN alone.
    """
    flags = [*TINY, "--data", make_folder(tmp_path / "set"), "--warmup-epochs", "0", "--resume"]
    with monkeypatch.context() as patch:
        at_steps(patch, with_nan, 3)
        train.main([*flags, "--out", str(tmp_path / "one")])
    for name in ("undisturbed", "stopped"):
        train.main([*flags, "--out", str(tmp_path / name), "--stop-at", "2"])
    nan = ["if step == 3 and RANK == 1:",
           "    terms['entropy'] = terms['entropy'] * float('nan')"]
    stopped = [*flags, "--out", str(tmp_path / "stopped")]
    script = write_script(tmp_path, *nan, "if step == 4 and RANK == 1:",
                          "    os.kill(os.getpid(), signal.SIGTERM)")
    done = forked.run_two([sys.executable, script, *stopped], env=environment())
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    # by the first process alone
    assert done.stdout.count("step 4 is not finite: entropy nan, loss nan, grad_norm nan") == 1
    assert done.stdout.count("step 5 is saved") == 1

    script = write_script(tmp_path, *nan, "if step == 5 and RANK == 1 and RESTARTS == 0:",
                          "    os.kill(os.getpid(), signal.SIGKILL)",
                          before=UNDISTURBED.format(flags=[*flags, "--out",
                                                           str(tmp_path / "undisturbed")]))
    code, printed = torchrun(script, *stopped, restarts=1)
    assert code == 0, printed
    assert printed.count("step 4 is not finite: entropy nan, loss nan, grad_norm nan") == 1, printed
    assert printed.count("ckpt.pt at step 5") == 2, printed
    assert ("process 0 lost its connection to another one and leaves; the last checkpoint is whole"
            in printed), printed
    assert not differences(read_checkpoint(tmp_path / "undisturbed"),
                           read_checkpoint(tmp_path / "stopped"))

    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "undisturbed")
    assert read_log(tmp_path / "stopped") == two
    for log in (one, two):
        assert [row["skipped"] for row in log] == ["", "0", "1", "0"]
    for name in ("consistency", "entropy", "loss"):
        for row_1, row_2 in zip(one[1:], two[1:], strict=True):
            assert float(row_2[name]) == pytest.approx(float(row_1[name]), rel=1e-3, abs=1e-5)


def test_a_restart_by_torchrun_implies_resume(tmp_path, monkeypatch, capsys):
    train_tiny(tmp_path, "--stop-at", "2")
    assert ddp.RESTARTS == 0
    assert "already holds a run" in sentence_of_refusal(capsys, tmp_path)
    monkeypatch.setattr(ddp, "RESTARTS", 1)
    train_tiny(tmp_path, "--stop-at", "3")
    assert "ckpt.pt at step 2" in capsys.readouterr().out
