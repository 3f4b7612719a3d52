"""support/control.py: a run's control is found in results/, or named as a command.
zoo/supervised.py: the labels that a step holds."""
import csv
import shutil

import pytest
import torch
from torch.nn import functional as F

import collapse
import config
import data
import heads
import losses
import views
from conftest import make_folder, train_tiny
from support import control


def args(*flags):
    return config.parse([*flags, "--device", "cpu"])


def results(folder, *rows):
    with open(folder / "table.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["command", "knn", "unique_0.5", "data_version"])
        writer.writeheader()
        for command, knn, version in rows:
            writer.writerow({"command": command, "knn": knn, "unique_0.5": 1,
                             "data_version": version})


def test_the_control_is_the_row_whose_other_flags_are_equal(tmp_path):
    version = data.VERSIONS["shapes"]
    results(tmp_path,
            ("train.py 'frozen", 93, version),  # no shell could read it
            ("train.py --prototypes frozen --seed 0", 70, version),
            ("train.py --seed 1 --prototypes frozen --epochs 5 --steps 300", 50, version),
            ("train.py --prototypes frozen --steps 300 --seed 2", 60, version),
            ("train.py --prototypes frozen --steps 300 --seed 2", 99, version - 1),  # other images
            ("train.py --prototypes joint --steps 300", 98, version),
            ("train.py --prototypes frozen --steps 300 --lr 0.5", 97, version),
            ("train.py --prototypes frozen --steps 300 --no-longer-a-flag 1", 96, version),
            ("train.py --prototypes frozen --steps 300 --method dino", 95, version),
            ("train.py --prototypes frozen --steps 300 --method", 94, version))
    # flags of the mixture, of logging and the seed do not matter for frozen prototypes
    run = args("--steps", "300", "--beta", "1", "1", "--gmm-init", "features", "--log-every", "7",
               "--seed", "5")
    sentence = control.sentence(run, tmp_path)
    assert "k-NN 55.0 (50.0 to 60.0), unique(.5) 1.000\n  in 2 earlier runs (" in sentence
    assert "table.csv" in sentence
    alone = control.sentence(args("--method", "carp"), tmp_path)
    assert "k-NN 70.0, unique(.5) 1.000\n  in one earlier run (" in alone
    assert "not in results/" in control.sentence(args("--momentum", "0.5"), tmp_path)


@pytest.mark.parametrize("flags", [
    [], ["--method", "dino", "--no-head-norm", "--lr", "0.01", "--seed", "3"],
    ["--preset", "cifar10-cpu", "--jitter", "0.1", "0.2", "0.3", "0.1", "--epochs", "2"],
    ["--method", "carl", "--num-prototypes", "64", "--data-root", "elsewhere"],
    ["--preset", "paper-dino", "--lr", "0.1"], ["--preset", "paper-dino", "--method", "carp"],
    ["--steps", "9", "--head-norm", "--prototypes", "live", "--live-eta", "0.5"]])
def test_the_command_of_a_control_gives_the_same_run_with_frozen_prototypes(tmp_path, flags):
    run = args(*flags)
    words = control.command(run).split()
    assert words[:2] == ["python", "train.py"]
    again = args(*words[2:])
    assert again.prototypes == "frozen" and again.seed == run.seed
    assert control.flags_of_control(again) == control.flags_of_control(run)
    assert again.data_root == run.data_root


def test_a_run_that_has_ended_does_not_fail_over_its_control(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_bytes(b"command,knn\n\xff\xfe,1\n")
    (tmp_path / "b.csv").write_text("command,knn\n\"train.py 'frozen\",1\n")
    (tmp_path / "c.csv").write_text("command,knn\ntrain.py --prototypes frozen,1\n")
    (tmp_path / "d.csv").mkdir()
    results(tmp_path, ("train.py --prototypes frozen --batch-size 66", "many",
                       data.VERSIONS["shapes"]))
    run = args("--batch-size", "66")
    monkeypatch.setattr(control.config.rules, "check", lambda *_: pytest.fail("flags were checked"))
    # as on three processes, where the default batch of 64 would be refused
    sentence = control.sentence(run, tmp_path)
    assert "not in results/" in sentence and "python train.py --batch-size 66" in sentence


def test_the_control_of_a_script_with_flags_of_its_own_is_not_guessed(tmp_path):
    run = args()
    run.script, run.my_flag = "zoo/mine.py", 3
    assert "the same command with\n  --prototypes frozen, and" in control.sentence(run, tmp_path)


@pytest.mark.parametrize("of_class, of_patches, sentence", [
    ("joint", "decoupled", "with\n  --prototypes frozen or --patch-prototypes frozen, and"),
    ("joint", "frozen", "with\n  --prototypes frozen, and"),
    ("frozen", "decoupled", "with\n  --patch-prototypes frozen, and"),
    ("frozen", "frozen", "This run is the control")])
def test_a_run_with_two_sets_has_a_control_for_each_that_moves(of_class, of_patches, sentence):
    run = args("--prototypes", of_class)
    run.script, run.patch_prototypes = "zoo/mine.py", of_patches
    assert sentence in control.sentence(run)
    run.shared_prototypes = True  # then --prototypes names the one set
    assert "--patch-prototypes" not in control.sentence(run)


def test_a_frozen_run_is_a_control_itself(tmp_path):
    assert "is the control" in control.sentence(args("--prototypes", "frozen"), tmp_path)


# ---- zoo/supervised.py -------------------------------------------------------------------------
def supervised(y, C, batch_size, monkeypatch, **more):
    x = torch.zeros(4 if y is None else len(y), 3, 32, 32, dtype=torch.uint8)
    images = data.Images(x, y, [f"c{i}" for i in range(C)], "x")
    monkeypatch.setattr(data, "load", lambda name, **settings: (images, None))
    flags = [str(w) for pair in more.items() for w in (f"--{pair[0].replace('_', '-')}", pair[1])]
    run = args("--method", "supervised", "--batch-size", str(batch_size), *flags)
    run.data_seen = data.identity(images, "x")
    return losses.loss(run)


def test_supervised_meets_the_labels_of_the_images_of_the_step(monkeypatch):
    y = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(0))
    loss = supervised(y, 3, 8, monkeypatch, seed=4)
    # every image is its own number: the crops of a step say which images it holds
    x = (torch.arange(50) * 5).to(torch.uint8).view(50, 1, 1, 1).expand(50, 3, 32, 32)
    recipe = views.Recipe(32, 16, 0, jitter_p=0, gray_p=0, blur_p=(0, 0, 0), solarize_p=(0, 0, 0))
    images = data.Images(x, y, ["a", "b", "c"], "x")
    steps = views.batches(images, recipe, batch_size=8, seed=4, start=5, stop=9)
    for step, crops in enumerate(steps, 5):
        grey = crops[0][:, 0].mean((1, 2)) * views.STD[0] + views.MEAN[0]
        shown = (grey * 255 / 5).round().long()
        assert torch.equal(loss.targets(torch.zeros(2, 8, 4), None, step)[0], y[shown])


def test_supervised_is_the_cross_entropy_of_all_views_over_the_first_prototypes(monkeypatch):
    loss = supervised(torch.tensor([0, 1, 2, 1]), 3, 4, monkeypatch)
    protos = heads.Joint(7, 5)
    h = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.tensor([[2, 0]])
    value = loss(h, y, protos, protos, 0)["cross_entropy"]
    C = protos.vectors()[:3]
    expected = sum(F.cross_entropy(h[v] @ C.T, y[0]) for v in range(4)) / 4
    assert torch.allclose(value, expected)
    value.backward()
    assert protos.weight.grad[:3].abs().sum() > 0 and protos.weight.grad[3:].abs().sum() == 0


def test_supervised_refuses_what_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="--num-prototypes 2 are fewer than the 3 classes"):
        supervised(torch.tensor([0, 1, 2, 1]), 3, 4, monkeypatch, num_prototypes=2,
                   partition_size=2)
    with pytest.raises(ValueError, match="needs labels"):
        supervised(None, 0, 4, monkeypatch)


def test_supervised_runs_are_shown_other_images_where_their_own_are_not(tmp_path, capsys):
    images, others = make_folder(tmp_path / "set"), make_folder(tmp_path / "others")
    train_tiny(tmp_path / "run", "--method", "supervised", "--prototypes", "joint",
               "--data", images)
    shutil.rmtree(images)
    capsys.readouterr()
    collapse.main([str(tmp_path / "run"), "--data", others])
    assert "perplexity" in capsys.readouterr().out


def test_the_control_is_that_of_the_first_table_that_has_one(tmp_path):
    for name, knn, unique in (("a", 50, .25), ("b", 70, .75)):
        with open(tmp_path / f"{name}.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, ["command", "knn", "unique_0.5", "data_version"])
            writer.writeheader()
            writer.writerow({"command": "train.py --prototypes frozen", "knn": knn,
                             "unique_0.5": unique, "data_version": data.VERSIONS["shapes"]})
    sentence = control.sentence(config.parse(["--device", "cpu"]), tmp_path)
    assert "k-NN 50.0, unique(.5) 0.250\n  in one earlier run (" in sentence
    assert "a.csv" in sentence
