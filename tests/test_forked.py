"""tests/forked.py: a command ends, prints and finds its files as one that `python` starts."""
import os
import signal
import subprocess
import sys

import pytest

import forked

CODE = """
import os, sys
print(sys.argv[1:], os.environ["WORD"], os.path.basename(os.getcwd()), "config" in sys.modules)
import neighbour
"""


@pytest.mark.parametrize("command", [["-c", CODE], ["script.py"], ["-m", "script"]])
def test_arguments_environment_folder_and_modules(command, tmp_path):
    (tmp_path / "script.py").write_text(CODE)
    (tmp_path / "neighbour.py").write_text("print('imported')")
    command = [sys.executable, *command, "--flag", "7"]
    settings = dict(cwd=tmp_path, env=os.environ | {"WORD": "red"}, capture_output=True)
    done = forked.run(command, **settings)
    expected = subprocess.run(command, text=True, **settings)
    assert done.stdout == expected.stdout == (
        f"['--flag', '7'] red {tmp_path.name} False\nimported\n")
    assert done.returncode == expected.returncode == 0 and done.stderr == expected.stderr == ""


@pytest.mark.parametrize("code, number, error", [
    ("import sys; sys.exit(3)", 3, ""),
    ("import sys; sys.exit('a sentence')", 1, "a sentence"),
    ("1 / 0", 1, "ZeroDivisionError"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "")])
def test_exit_codes(code, number, error):
    done = forked.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == number and error in done.stderr
    with pytest.raises(subprocess.CalledProcessError):
        forked.run([sys.executable, "-c", code], check=True)


def test_a_command_that_does_not_end():
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)


def test_two_processes_find_each_other_and_the_one_that_fails_is_told():
    code = ("import torch, torch.distributed as dist; dist.init_process_group('gloo'); "
            "x = torch.ones(1); dist.all_reduce(x); print(x); "
            "dist.destroy_process_group(); raise SystemExit(5 * {fails})")
    both = forked.run_two([sys.executable, "-c", code.format(fails="0")])
    assert both.returncode == 0 and both.stdout == "tensor([2.])\n"
    one = forked.run_two([sys.executable, "-c", code.format(
        fails="(__import__('os').environ['RANK'] == '1')")])
    assert one.returncode == 5
