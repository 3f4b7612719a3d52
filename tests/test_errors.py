"""What all commands do with errors: environment, flags, memory, output that cannot be written."""
import argparse
import io
import math
import multiprocessing
import os
import sys

import pytest
import torch

import config
import data
import forked
import views
from conftest import make_folder, sentence_of_refusal
from lab import chaos
from support import ddp, errors, flags
from support.files import write

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- processes that decode images --------------------------------------------------------------
@pytest.mark.parametrize("error", [SystemExit(130), ValueError("no"), ZeroDivisionError()])
def test_no_decoding_process_outlives_an_error(tmp_path, error):
    """Not even while somebody holds the error, and with it the functions that it came through."""
    images, recipe = data.load(make_folder(tmp_path / "set"), img_size=32)[0], views.Recipe(32, 16)
    images = data.Files(images.paths, images.y, images.classes, "set")  # not in memory

    def train():
        batches = views.batches(images, recipe, batch_size=4, seed=0, start=0, stop=9, rank=0,
                                world=1, device="cpu", workers=1)
        next(batches)
        assert multiprocessing.active_children()
        raise error

    with pytest.raises((SystemExit, ZeroDivisionError)) as held, errors.one_sentence("tool"):
        train()
    assert held.value.__traceback__ and not multiprocessing.active_children()


# ---- the environment ---------------------------------------------------------------------------
WHOLE = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "3",
         "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_a_launchers_environment_and_none():
    assert ddp.read_environment(WHOLE) == [1, 0, 2, 3]
    assert ddp.read_environment({"PATH": "x"}) == [0, 0, 1, 0]
    assert ddp.read_environment({"RANK": "0", "WORLD_SIZE": "1"}) == [0, 0, 1, 0]


@pytest.mark.parametrize("change, words", [
    ({"WORLD_SIZE": None}, "RANK is set in the environment and WORLD_SIZE is not"),
    ({"RANK": None}, "WORLD_SIZE is set in the environment and RANK is not"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment is not a whole number"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is not a whole number"),
    ({"WORLD_SIZE": "0"}, "RANK=1 in the environment must be below WORLD_SIZE=0"),
    ({"RANK": "2"}, "RANK=2 in the environment must be below WORLD_SIZE=2"),
    ({"RANK": "-1"}, "RANK='-1' in the environment is not"),
    ({"RANK": "9" * 20}, "in the environment is not a whole number"),
    ({"LOCAL_RANK": "0.5"}, "LOCAL_RANK='0.5' in the environment is not"),
    ({"LOCAL_RANK": "²"}, "LOCAL_RANK='²' in the environment is not"),
    ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT='x' in the environment"),
    ({"MASTER_ADDR": None}, "WORLD_SIZE=2 in the environment needs MASTER_ADDR and MASTER_PORT"),
    ({"MASTER_ADDR": ""}, "needs MASTER_ADDR"),
    ({"MASTER_PORT": None}, "MASTER_PORT='' in the environment is not the number of a port"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999' in the environment is not"),
])
def test_half_set_variables_are_refused(change, words):
    variables = {k: v for k, v in (WHOLE | change).items() if v is not None}
    with pytest.raises(ValueError) as error:
        ddp.read_environment(variables)
    assert words in str(error.value)


@pytest.mark.parametrize("command", [
    ["train.py"], ["eval_knn.py", "RUN"], ["eval_linear.py", "RUN"], ["collapse.py", "RUN"],
    ["-m", "lab.ablate", "main"], ["-m", "lab.bench"], ["-m", "lab.chaos"], ["-m", "lab.fuzz"],
    ["-m", "lab.gpu"], ["-m", "lab.hosts"]])
def test_every_command_refuses_a_half_set_environment(command, tmp_path):
    done = forked.run([sys.executable, *command], capture_output=True, cwd=ROOT,
                      env=os.environ | {"RANK": "1"})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1
    assert "error: RANK is set in the environment and WORLD_SIZE is not" in done.stderr


def test_a_port_that_is_taken_is_one_sentence(tmp_path):
    import socket
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        done = forked.run(
            [sys.executable, "train.py", "--device", "cpu", "--out", str(tmp_path / "out")],
            capture_output=True, cwd=ROOT, timeout=100,
            env=os.environ | WHOLE | {"RANK": "0", "MASTER_PORT": port})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train.py: error: process 0 of 2 cannot meet the others at MASTER_ADDR" in done.stderr
    assert not os.path.exists(tmp_path / "out")


def test_one_gpu_for_several_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(ddp, "WORLD", 2)
    with pytest.raises(SystemExit):
        config.parse(["--device", "cuda:0"])
    assert "--device cuda:0 names one GPU, and each of 2 processes" in capsys.readouterr().err
    assert config.parse(["--device", "cpu:0"]).device == "cpu:0"


# ---- flags -------------------------------------------------------------------------------------
@pytest.mark.parametrize("given, sentence", [
    ("--jitter nan .4 .4 .1", "--jitter must not be negative, got nan 0.4 0.4 0.1"),
    ("--jitter .4 inf .4 .1", "--jitter must be a number below 4294967296 in size, got 0.4 inf"),
    ("--jitter .4 .4 .4 .6", "--jitter needs a hue of at most 0.5"),
    ("--jitter .4 .4 .4", "--jitter: expected 4 arguments"),
    ("--method dino --teacher-temp .04 nan", "--teacher-temp must be positive, got 0.04 nan"),
    ("--global-scale nan 1", "--global-scale must be a number below 4294967296 in size, got nan"),
    ("--imbalance inf", "--imbalance must be a number below 4294967296 in size, got inf"),
    ("--imbalance nan", "--imbalance must be at least 1"),
    ("--epochs 1e400", "--epochs must be a number below 4294967296 in size, got inf"),
    ("--lr 1e300", "--lr must be a number below 4294967296 in size, got 1e+300"),
    ("--seed " + "9" * 20, "--seed must be a number below 4294967296 in size, got " + "9" * 20),
    ("--seed -1", "--seed must not be negative, got -1"),
    ("--steps " + "9" * 400, "--steps must be a number below 4294967296 in size, got 99"),
    ("--steps " + "9" * 5000, "invalid int value"),
    ("--steps 0", "--steps must be at least 1, got 0"),
    ("--local-crops 1001", "--local-crops must lie in [0, 1000], got 1001"),
    ("--workers -1", "--workers must lie in [0, 1000], got -1"),
    ("--data=", "--data must not be empty"),
    ("--out=", "--out must not be empty"),
    ("--init=", "--init must not be empty"),
    ("--device=", "--device must not be empty"),
    ("--device cpu:x", "--device cpu:x does not work here"),
    ("--img-size 1 --arch resnet18", "--img-size must be at least 2, got 1"),
    ("--eta-c 1e-30 --eta-a 0", "--eta-c 1e-30 is so small that the forgetting factor of the"),
])
def test_train_refuses_numbers_and_texts_that_cannot_be(given, sentence, capsys, tmp_path):
    assert sentence in sentence_of_refusal(capsys, tmp_path / "out", *given.split())
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("out, words", [
    ("/dev/full", "/dev/full: File exists"), ("{file}", "{file}: File exists"),
    ("{file}/below", "{file}/below: Not a directory")])
def test_a_folder_that_cannot_be_one(out, words, capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    name = str(tmp_path / "file")
    sentence = sentence_of_refusal(capsys, out.format(file=name))
    assert f"train.py: error: {words.format(file=name)}" == sentence
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("given, sentence", [
    ("--kills -1", "--kills must not be negative, got -1"),
    ("--steps 0", "--steps must be at least 1, got 0"),
    ("--script zoo/gone.py", "--script zoo/gone.py is neither train.py nor a script of zoo/"),
    ("--script zoo/bank.py", "--script zoo/bank.py is neither train.py nor a script of zoo/"),
    ("--script gmm.py", "--script gmm.py is neither train.py nor a script of zoo/"),
    ("--longest nan", "--longest must be at least 0.02, got nan"),
    ("--longest inf", "--longest must be a number below 4294967296 in size, got inf")])
def test_chaos_refuses_numbers_that_cannot_be(given, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        chaos.main(given.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"lab.chaos: error: {sentence}\n"


def test_a_reader_of_the_output_that_has_ended_is_not_a_file_of_the_run():
    sentence = errors.sentence_of(BrokenPipeError(32, "Broken pipe"), "runs/mine")
    assert sentence == "what read the output of this command has ended, and so the command does"


def test_no_number_beyond_the_limits_passes_whatever_the_table_says():
    for value in (math.nan, math.inf, -math.inf, 2 ** 32, -2 ** 32, [1.0, math.nan], 10 ** 400):
        with pytest.raises(ValueError, match="--some-flag must be a number below 4294967296 in"):
            flags.check_values(argparse.Namespace(some_flag=value), [])
    flags.check_values(argparse.Namespace(a=2 ** 32 - 1, b=None, c="text", d=[0.5], e=True), [])


@pytest.mark.parametrize("flag, value, fits", [
    ("steps", 5, True), ("steps", 5.5, False), ("steps", "5", False), ("steps", True, False),
    ("lr", 1, True), ("lr", 0.1, True), ("lr", "0.1", False), ("amp", False, True),
    ("amp", 1, False), ("data", "here", True), ("data", 3, False), ("head_norm", True, True),
    ("head_norm", None, True), ("compile", "yes", False), ("beta", [1, 0.5], True),
    ("beta", [1, "x"], False), ("beta", [1], False), ("method", "carp", True),
    ("method", "carps", False)])
def test_values_of_a_damaged_args_json_have_the_types_of_their_flags(flag, value, fits):
    action, = [a for a in config.parser()._actions if a.dest == flag]
    assert config.could_be(value, action) is fits


@pytest.mark.parametrize("value, fits", [
    ([3, 5], True), ([3], True), ([], False), (3, False), ([3.5], False), ([None], False)])
def test_values_of_a_flag_of_a_fork_that_takes_any_number_of_them(value, fits):
    p = argparse.ArgumentParser()
    action = p.add_argument("--milestones", type=int, nargs="+", default=[2, 4])
    assert config.could_be(value, action) is fits


def test_values_of_a_flag_of_a_fork_that_takes_one_number_or_none():
    p = argparse.ArgumentParser()
    action = p.add_argument("--warm", type=int, nargs="?", const=1, default=3)
    assert config.could_be(3, action) and not config.could_be([3], action)


def test_values_of_a_flag_of_a_fork_that_takes_two_names():
    p = argparse.ArgumentParser()
    action = p.add_argument("--names", nargs=2, default=["a", "b"])
    assert config.could_be(["c", "d"], action)
    assert not config.could_be(["c"], action) and not config.could_be(["c", 1], action)


@pytest.mark.parametrize("value", [torch.zeros(0), torch.zeros(2), [torch.zeros(2)], "x", None, {}])
def test_a_value_that_a_flag_cannot_have_differs_from_any(value):
    new = vars(config.parse(["--device", "cpu"]))
    change, = config.differences(new | {"lr": value}, new)
    assert change.startswith("--lr ") and change.endswith(" -> 0.018")
    for name in ("method", "prototypes"):
        changes = config.differences(new | {name: value}, new)
        assert f"-> {new[name]}" in changes[0] and changes[0].startswith(f"--{name} ")
    assert config.differences(new, new) == []


@pytest.mark.parametrize("values, sentence", [
    ({"learning_rate": 9.0}, "--preset mine: there is no flag 'learning_rate'"),
    ({"num-prototypes": 32}, "--preset mine: there is no flag 'num-prototypes'"),
    ({"save_every": 2.0}, "--preset mine: save_every cannot be 2.0"),
    ({"prototypes": "foo"}, "--preset mine: prototypes cannot be 'foo'"),
    ({"blur": [0.5]}, "--preset mine: blur cannot be [0.5]"),
    ({"teacher_temp": 0.04}, "--preset mine: teacher_temp cannot be 0.04"),
    ({"head_bn": "no"}, "--preset mine: head_bn cannot be 'no'")])
def test_a_preset_that_cannot_be_is_one_sentence(values, sentence, capsys, monkeypatch):
    monkeypatch.setitem(config.PRESETS, "mine", values)
    with pytest.raises(SystemExit) as refusal:
        config.parse(["--preset", "mine"])
    assert refusal.value.code == 2 and sentence in capsys.readouterr().err


def test_a_preset_may_have_tuples(monkeypatch):
    """As a run keeps lists, it could not be resumed otherwise."""
    monkeypatch.setitem(config.PRESETS, "mine", {"global_scale": (0.3, 1.0)})
    assert config.parse(["--preset", "mine"]).global_scale == [0.3, 1.0]


def test_help_says_no_default_of_none():
    text = config.parser().format_help()
    assert "(default: None)" not in text and "(default: 1024)" in text


# ---- errors ------------------------------------------------------------------------------------
def leave(error, out=None):
    """The exit code of a command in which this error happens."""
    with pytest.raises(SystemExit) as stop, errors.one_sentence("tool", out):
        raise error
    return stop.value.code


@pytest.mark.parametrize("error, sentence", [
    (ValueError("two\n  lines"), "two lines"),
    (OSError(28, "No space left on device", "there"), "there: No space left on device"),
    (OSError(28, "No space left on device"), "OUT: No space left on device"),
    (OSError("image file is truncated"), "OUT: image file is truncated"),
    (MemoryError(), "there is not enough memory"),
])
def test_an_error_is_one_line(error, sentence, capsys):
    assert leave(error, "OUT") == 2
    assert capsys.readouterr().err == f"tool: error: {sentence}\n"


def test_words_of_python_and_torch_come_with_the_line_of_ours(capsys, tmp_path, monkeypatch):
    """A forker needs it; a sentence that we raise is for who types flags."""
    monkeypatch.setattr(errors, "ROOT", str(tmp_path))
    source = "import torch\ndef mend(x):\n    B, D = x.shape\n    torch.zeros(2).view(3, B)\n"
    (tmp_path / "fork.py").write_text(source)
    namespace = {}
    exec(compile(source, str(tmp_path / "fork.py"), "exec"), namespace)
    with pytest.raises(SystemExit), errors.one_sentence("tool"):
        namespace["mend"](torch.zeros(2, 3, 4))
    assert capsys.readouterr().err.endswith("(expected 2) (fork.py, line 3)\n")


@pytest.mark.parametrize("sizes", [(2 ** 50,), (2 ** 32, 2 ** 32), (2 ** 62, 2)])
def test_tensors_that_no_memory_holds_are_one_line(sizes, capsys):
    with pytest.raises(RuntimeError) as error:
        torch.zeros(sizes)
    assert leave(error.value) == 2
    err = capsys.readouterr().err
    assert err.startswith("tool: error: there is not enough memory (") and err.count("\n") == 1


def test_a_decoding_process_that_has_gone_is_named_also_under_another_error(capsys):
    """The signal may come while a checkpoint is written, and torch then cannot close its file."""
    with pytest.raises(SystemExit) as stop, errors.one_sentence("tool"):
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2 vs 1")
    assert stop.value.code == 1
    assert "a process that decodes images (--workers) was ended" in capsys.readouterr().err


class Breaks(torch.utils.data.Dataset):
    """As a DataLoader receives tensors of a process that has just gone."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, i):
        raise self.error


@pytest.mark.parametrize("error", [
    ConnectionResetError(104, "Connection reset by peer"),
    ConnectionRefusedError(111, "Connection refused"), EOFError()])
def test_a_decoding_process_that_goes_while_it_sends_is_named_too(capsys, error):
    with pytest.raises(SystemExit) as stop, errors.one_sentence("tool"):
        list(torch.utils.data.DataLoader(Breaks(error)))
    assert stop.value.code == 1
    assert "a process that decodes images (--workers) was ended" in capsys.readouterr().err
    if isinstance(error, OSError):  # from elsewhere
        assert leave(type(error)(*error.args)) == 2


def test_torchs_own_word_may_come_while_a_broken_connection_is_looked_at(capsys, monkeypatch):
    """It comes from a handler of signals, at any line."""
    asked, ask = [], errors.is_of_decoding

    def interrupted(error):
        asked.append(error)
        if len(asked) == 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        return ask(error)
    monkeypatch.setattr(errors, "is_of_decoding", interrupted)
    with pytest.raises(SystemExit) as stop, errors.one_sentence("train.py"):
        raise ConnectionResetError(104, "Connection reset by peer")
    assert stop.value.code == 1 and len(asked) == 2
    assert "a process that decodes images (--workers) was ended" in capsys.readouterr().err


def test_a_bug_of_ours_stays_a_traceback():
    for error in (EOFError(), RuntimeError("shapes do not fit"), TypeError("x"), KeyError("y")):
        with pytest.raises(type(error)), errors.one_sentence("tool"):
            raise error


def test_what_a_stream_cannot_encode_is_written_as_an_escape(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with errors.one_sentence("tool"):
        print("caf\udce9 ± 1")
    assert stream.buffer.getvalue() == b"caf\\udce9 \\xb1 1\n"


PRINTS = """
import os, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
sys.stdout = open(1, "w", closefd=False)  # a buffer, written at the end
from support import errors
with errors.one_sentence('tool'):
    print('numbers')
"""


def test_full_standard_output_is_one_line():
    done = forked.run([sys.executable, "-c", PRINTS], cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and done.stderr == "tool: error: No space left on device\n"


def test_a_file_is_as_it_was_after_any_error(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def put(file):
        file.write(b"new")
        raise KeyError("a bug")
    with pytest.raises(KeyError):
        write(str(path), put)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
