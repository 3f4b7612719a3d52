"""train.py through main([...]): every method and prototype set, resume, two processes, bad input, and the house rules."""
import ast
import csv
import functools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from torchvision.utils import save_image

import config
import data
import models
from support import run as folder
from support import shapes
import train

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--device", "cpu", "--batch-size", "8", "--steps", "3", "--num-prototypes", "16", "--partition-size", "8",
        "--bottleneck-dim", "8", "--head-hidden", "16", "--local-crops", "1", "--eval-bank", "60", "--eval-queries", "40",
        "--log-every", "1", "--eval-every", "3", "--gmm-start", "1"]
GRID = [(m, p) for m in ("carp", "carl", "dino") for p in ("joint", "kp", "frozen", "decoupled", "live")] + [("dino", "vmf")]


@functools.lru_cache
def small():
    x, y, classes = shapes.make(150, 5)
    images = data.Images(x, y, classes, "shapes")
    return data.subset(images, torch.arange(100)), data.subset(images, torch.arange(100, 150))


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """150 images instead of 12,000: the tests drive everything, and learn nothing."""
    real = data.load
    monkeypatch.setattr(data, "load", lambda name, **kw: small() if name == "shapes" else real(name, **kw))


def run(out, *flags):
    return train.main([*TINY, "--out", str(out), *flags])


def rows(out):
    with open(out / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def ckpt(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def flat(x, name=""):
    """Every tensor and number of a nested checkpoint, by path."""
    if isinstance(x, dict):
        return {k: v for key, part in x.items() for k, v in flat(part, f"{name}/{key}").items()}
    if isinstance(x, (list, tuple)):
        return {k: v for i, part in enumerate(x) for k, v in flat(part, f"{name}/{i}").items()}
    return {name: x}


def same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    return [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method, prototypes", GRID)
def test_every_method_and_prototype_set_trains(tmp_path, method, prototypes):
    metrics = run(tmp_path, "--method", method, "--prototypes", prototypes)
    assert 0 <= metrics["knn"] <= 100 and set(metrics["unique"]) == {0.025, 0.5} and 0 < metrics["used"] <= 1
    saved, log = ckpt(tmp_path), rows(tmp_path)
    assert saved["step"] == 3 and saved["args"]["method"] == method and [int(r["step"]) for r in log] == [0, 1, 2, 3]
    assert all(k.startswith(("backbone.", "head.")) for net in ("student", "teacher") for k in saved[net])
    assert saved["prototypes"]["vectors"].shape == (16, 8) and bool(saved["gmm"]) == (prototypes in ("decoupled", "live"))
    assert (metrics["drift"] == 0) == (prototypes == "frozen")
    assert (float(log[-1]["penalty"]) != 0) == (prototypes == "kp")
    assert bool(log[-1]["cross_entropy"]) == (method == "dino") != bool(log[-1]["consistency"])
    assert 0 <= float(log[0]["raw_knn"]) <= 100 and log[0]["knn"]
    assert json.load(open(tmp_path / "args.json"))["prototypes"] == prototypes


def test_same_seed_same_losses_and_another_seed_others(tmp_path):
    a, b, c = (run(tmp_path / n, "--seed", s) and [r["loss"] for r in rows(tmp_path / n)] for n, s in (("a", "1"), ("b", "1"), ("c", "2")))
    assert a == b != c


def test_teacher_starts_as_the_student_and_shares_no_storage():
    args = config.parse(TINY)
    student, teacher, protos_s, protos_t = train.networks(config.parse([*TINY, "--prototypes", "joint"]), torch.device("cpu"), 0)
    pairs = list(zip([*student.parameters(), *protos_s.parameters()], [*teacher.parameters(), *protos_t.parameters()]))
    assert len(pairs) > 20 and all(torch.equal(s, t) and s.data_ptr() != t.data_ptr() for s, t in pairs)
    assert not any(t.requires_grad for _, t in pairs) and all(s.requires_grad for s, _ in pairs)
    _, _, shared, same_set = train.networks(args, torch.device("cpu"), 0)
    assert shared is same_set


@pytest.mark.parametrize("prototypes", ["joint", "decoupled", "live"])
def test_one_step_moves_what_it_should(tmp_path, prototypes):
    """Every student tensor moves; the teacher moves (1 - m) of the way to it; prototypes by gradient or by the mixture."""
    flags = ["--prototypes", prototypes, "--steps", "40", "--gmm-start", "0", "--momentum", "0.9", "--stop-at", "1"]
    start = train.networks(config.parse([*TINY, *flags]), torch.device("cpu"), 0)[0].state_dict()
    start = {k: v.clone() for k, v in start.items()}
    run(tmp_path, *flags, "--warmup-epochs", "0")
    saved = ckpt(tmp_path)
    names = [k for k in start if k in dict(models.MultiCrop.named_parameters(train.networks(config.parse(TINY), torch.device("cpu"), 0)[0]))]
    for k in names:
        moved = saved["student"][k] - start[k]
        if k != "backbone.blocks.0.attn.qkv.bias" and not k.startswith(("head.mlp.0.bias", "head.mlp.3.bias")):
            assert moved.abs().max() > 0, k  # (the key's bias and a bias before a batch norm have no gradient)
        assert torch.allclose(saved["teacher"][k] - start[k], 0.1 * moved, atol=1e-6), k
    # (the first step of live sees the very vectors it starts on, which are then their own means)
    assert torch.equal(saved["prototypes"]["vectors"], saved["prototypes"]["start"]) == (prototypes == "live")


def test_accumulation_gives_the_mixture_the_whole_batch(tmp_path):
    """All teacher vectors come before the update: without batch norm, 4 micro-batches give the mixture and losses of one."""
    for accum in ("1", "4"):
        run(tmp_path / accum, "--accum", accum, "--no-head-bn", "--method", "carp", "--gmm-start", "0")
    one, four = ckpt(tmp_path / "1"), ckpt(tmp_path / "4")
    assert torch.allclose(one["gmm"]["mu"], four["gmm"]["mu"], atol=1e-5)
    assert float(rows(tmp_path / "1")[1]["consistency"]) == pytest.approx(float(rows(tmp_path / "4")[1]["consistency"]), rel=1e-5)


@pytest.mark.parametrize("method, prototypes", GRID)
def test_six_steps_are_three_and_three_resumed_to_the_bit(tmp_path, method, prototypes):
    flags = ["--steps", "6", "--method", method, "--prototypes", prototypes]
    run(tmp_path / "whole", *flags)
    run(tmp_path / "parts", *flags, "--stop-at", "3")
    run(tmp_path / "parts", *flags, "--resume")
    a, b = ckpt(tmp_path / "whole"), ckpt(tmp_path / "parts")
    different = [k for k in same(a, b) if not k.startswith("/args/")]
    assert not different
    keep = [k for k in folder.COLUMNS if k not in ("images_per_s", "data_share", "memory_mb", "knn")]
    assert [[r[k] for k in keep if r["step"] != "3" or "_0." not in k] for r in rows(tmp_path / "whole")] == \
           [[r[k] for k in keep if r["step"] != "3" or "_0." not in k] for r in rows(tmp_path / "parts")]


def test_resnet_and_unlabelled_folder(tmp_path):
    """A folder without labels trains, says that there is no k-NN, and still measures prototypes."""
    os.makedirs(tmp_path / "flat")
    for i in range(24):
        save_image(torch.rand(3, 32, 32), tmp_path / "flat" / f"{i}.png")
    metrics = run(tmp_path / "out", "--data", str(tmp_path / "flat"), "--arch", "resnet18", "--steps", "2")
    assert metrics["knn"] is None and "unique" in metrics


def test_compiled_backbones_keep_their_names_and_a_compiler_that_fails_is_named(tmp_path, capsys, monkeypatch):
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: seen.append(net.arch) or original(net, backend="eager"))
    seen = []
    plain, compiled = run(tmp_path / "a"), run(tmp_path / "b", "--compile")
    a, b = ckpt(tmp_path / "a"), ckpt(tmp_path / "b")
    assert seen == ["vit_nano"] * 2 and a["teacher"].keys() == b["teacher"].keys()
    assert all(torch.allclose(v, b["student"][k], atol=1e-5) for k, v in a["student"].items())
    assert compiled["unique"] == plain["unique"]

    def broken(graph, inputs):
        raise ValueError("no compiler")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: original(net, backend=broken))
    torch.compiler.reset()
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "c", "--compile")
    assert stop.value.code == 2 and "--compile does not work here" in capsys.readouterr().err


# ---- two processes ---------------------------------------------------------------------------------------------------
SPREAD = [("--prototypes decoupled", 1e-4), ("--prototypes joint", 1e-4), ("--prototypes live --method dino --targets sinkhorn", 1e-4),
          ("--prototypes decoupled --no-head-bn --gmm-start 0.5 --lr 1e-5", 1e-6)]  # batch norm and AdamW enlarge rounding


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """All of SPREAD on one process, here, and on two, in one real launch. A folder with CASE-PROCESSES for each."""
    base = tmp_path_factory.mktemp("spread")
    for c in "ab":
        os.makedirs(base / "set" / c)
        for i in range(16):
            save_image(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(ord(c) * 100 + i)), base / "set" / c / f"{i}.png")
    one, two = ([[*TINY, "--steps", "4", "--data", str(base / "set"), "--out", str(base / f"{case}-{n}"), *flags.split()]
                 for case, (flags, _) in enumerate(SPREAD)] for n in (1, 2))
    (base / "two.py").write_text(f"import sys\nsys.path.insert(0, {HERE!r})\nfrom support import ddp\nimport train\n"
                                 "cleanup, ddp.cleanup = ddp.cleanup, lambda: None\n"  # one process group for all
                                 f"for flags in {two[:-1]!r}:\n    train.main(flags)\nddp.cleanup = cleanup\ntrain.main({two[-1]!r})\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(29_900 + os.getpid() % 90)]
    done = subprocess.run([*launch, base / "two.py"], text=True, timeout=240, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for flags in one:
            train.main(flags)
    finally:
        torch.set_num_threads(threads)
    return base


@pytest.mark.parametrize("case", range(len(SPREAD)))
def test_two_processes_equal_one(spread, case):
    """Global batch, batch norm, entropy, gradients and mixture over two gloo processes: the losses of one process."""
    within = SPREAD[case][1]
    one, two = rows(spread / f"{case}-1"), rows(spread / f"{case}-2")
    for name in ("consistency", "entropy", "cross_entropy", "loss"):
        assert [float(r[name] or 0) for r in two[1:]] == pytest.approx([float(r[name] or 0) for r in one[1:]], rel=max(within, 1e-5), abs=1e-6)  # six digits
    a, b = ckpt(spread / f"{case}-1"), ckpt(spread / f"{case}-2")
    C = a["prototypes"]["vectors"]
    assert torch.allclose(C, b["prototypes"]["vectors"], rtol=0, atol=within * min(1.0, float(C.abs().max())))
    for k, v in a["teacher"].items():
        assert torch.allclose(v.float(), b["teacher"][k].float(), atol=2e-3), k


# ---- bad input -------------------------------------------------------------------------------------------------------
def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *map(str, flags)])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("flags, text", [
    (["--preset", "nope"], "nope"), (["--method", "nope"], "nope"), (["--batch", "8"], "unrecognized arguments: --batch"),
    (["--img-size", "36"], "--img-size 36 must be a multiple of --patch-size 8"),
    (["--prototypes", "vmf"], "--prototypes vmf has concentrations in units of DINO's temperatures; got --method carp"),
    (["--prototypes", "live", "--method", "dino", "--num-prototypes", "1"], "--prototypes live needs --num-prototypes 2 or more, got 1"),
    (["--teacher-temp", "0", "0.04"], "--teacher-temp must be positive, got 0.0 0.04"),
    (["--partition-size", "5"], "--num-prototypes 16 must be a multiple of --partition-size 5"),
    (["--eta-c", "1.2"], "--eta-c must lie in (0, 0.99), the range in which A.7 rises to 0.99, got 1.2"),
    (["--beta", "0.1", "1.5"], "--beta must lie in [0, 1], got 0.1 1.5"), (["--lr", "nan"], "--lr must be positive, got nan"),
    (["--batch-size", "9", "--accum", "2"], "--batch-size 9 must be a multiple of --accum 2"),
    (["--batch-size", "101"], "--batch-size 101 is more than the 100 images"), (["--stop-at", "9"], "--stop-at 9 lies beyond"),
    (["--data", "nowhere"], "--data nowhere is neither a folder nor one of the sets"), (["--device", "tpu"], "--device must be auto"),
    (["--imbalance", "0.5"], "--imbalance"), (["--global-scale", "0.9", "0.2"], "--global-scale needs"),
    (["--patch-size", "4"], "--arch vit_nano has a stem of patch size 8, got --patch-size 4")])
def test_bad_flags_get_one_sentence_and_exit_code_2(capsys, tmp_path, flags, text):
    assert text in refused(capsys, "--out", tmp_path, *flags)
    assert not os.path.exists(tmp_path / "ckpt.pt")


def test_bad_folders(capsys, tmp_path):
    os.makedirs(tmp_path / "empty")
    assert "train/<class>" in refused(capsys, "--data", tmp_path / "empty", "--out", tmp_path / "o")
    os.makedirs(tmp_path / "one" / "cat")
    save_image(torch.rand(3, 32, 32), tmp_path / "one" / "cat" / "a.png")
    assert "one class" in refused(capsys, "--data", tmp_path / "one", "--out", tmp_path / "o").lower().replace("only a single", "one")


def test_a_run_is_never_written_over(capsys, tmp_path):
    run(tmp_path)
    before = open(tmp_path / "ckpt.pt", "rb").read()
    assert "already holds a run" in refused(capsys, "--out", tmp_path)
    assert "--num-prototypes 16 -> 32" in refused(capsys, "--out", tmp_path, "--resume", "--num-prototypes", "32")
    assert open(tmp_path / "ckpt.pt", "rb").read() == before
    open(tmp_path / "ckpt.pt", "wb").write(before[:1000])
    assert "holds no complete checkpoint of ours" in refused(capsys, "--out", tmp_path, "--resume")


def test_resume_needs_no_flag_typed_again(capsys, tmp_path):
    flags = ["--method", "dino", "--prototypes", "kp", "--steps", "4", "--lr", "0.01"]
    run(tmp_path / "a", *flags, "--stop-at", "2")
    train.main(["--out", str(tmp_path / "a"), "--resume", "--device", "cpu"])
    run(tmp_path / "b", *flags)
    assert ckpt(tmp_path / "a")["step"] == 4 and not [k for k in same(ckpt(tmp_path / "a"), ckpt(tmp_path / "b")) if "/args/" not in k]
    assert "--preset tiny -> cifar10" in refused(capsys, "--out", tmp_path / "a", "--resume", "--preset", "cifar10")
    before = open(tmp_path / "a" / "ckpt.pt", "rb").read()
    for text, words in (("[1]", "does not hold the flags of a run"), ('{"method": "foo"}', "says method = 'foo', which cannot be"),
                        ('{"lr": null}', "says lr = None, which cannot be"), ('{"beta": 3}', "says beta = 3, which cannot be")):
        open(tmp_path / "a" / "args.json", "w").write(text)
        assert words in refused(capsys, "--out", tmp_path / "a", "--resume")
    assert open(tmp_path / "a" / "ckpt.pt", "rb").read() == before


def test_trouble_is_named_once_while_it_happens(capsys, tmp_path):
    """Logits of nothing rest at ln P; a mixture from random directions leaves nearly all of its components unused."""
    run(tmp_path / "a", "--logit-scale", "1e-6", "--steps", "6", "--eval-every", "2")
    assert capsys.readouterr().out.count("the loss rests at 1.000 of ln K") == 1
    run(tmp_path / "b", "--steps", "40", "--gmm-init", "random", "--gmm-start", "0", "--num-prototypes", "512", "--eval-every", "20")
    assert capsys.readouterr().out.count("the mixture is dead") == 1


def test_a_run_that_diverges_ends_with_the_cause_and_saves_nothing(capsys, tmp_path):
    text = refused(capsys, "--out", tmp_path, "--lr", "1e30", "--steps", "6", "--eval-every", "6", "--warmup-epochs",
                   "0", "--prototypes", "frozen")
    assert re.search(r"three steps in a row, up to 4, were skipped; step 2 is not finite: consistency nan.*lower --lr", text)
    assert not os.path.exists(tmp_path / "ckpt.pt")


# ---- the house -------------------------------------------------------------------------------------------------------
def sources():
    return {f: open(os.path.join(HERE, f)).read() for f in sorted(os.listdir(HERE)) if f.endswith(".py") and not f.startswith("test_")}


def test_help_needs_no_network_and_names_every_default():
    text = subprocess.run([sys.executable, os.path.join(HERE, "train.py"), "--help"], capture_output=True, text=True, check=True).stdout
    assert "--num-prototypes" in text and "default: 1024" in text


@pytest.mark.parametrize("preset", config.PRESETS)
def test_presets_parse_and_hold_legal_values(preset):
    actions = {a.dest: a for a in config.parser()._actions}
    for name, value in config.PRESETS[preset].items():
        action = actions[name]
        assert not action.choices or value in action.choices
        assert not action.nargs or len(value) == action.nargs
    config.parse(["--preset", preset, "--device", "cpu"])


VIT = dict(patch_size=16, num_prototypes=65536, bottleneck_dim=256, weight_decay=0.04, weight_decay_end=0.4, warmup_epochs=10,
           optimizer="adamw", head_bn=False, head_hidden=2048, drop_path=0.1, batch_size=1024)
DINO = dict(VIT, arch="vit_small", method="dino", head_norm=True, student_temp=0.1, targets="center", lr=5e-4, min_lr=1e-6,
            momentum=0.996, clip_grad=3.0, freeze_prototypes=1, norm_last_layer=True, epochs=100, local_crops=6)
RN50 = dict(arch="resnet50", optimizer="lars", lr=0.45, min_lr=0.0048, warmup_epochs=0, weight_decay=1e-6, weight_decay_end=1e-6,
            momentum=0.99, clip_grad=0, global_scale=[0.2, 1.0], local_scale=[0.05, 0.2], local_crops=6, head_bn=True, head_norm=False,
            num_prototypes=65536)


@pytest.mark.parametrize("preset, values", [
    # Table B.1, and the settings of the mixture in B.1 and A.2
    ("paper-vits", dict(VIT, arch="vit_small", momentum=0.992, global_scale=[0.32, 1.0], local_scale=[0.05, 0.32], lr=5e-4, min_lr=1e-6,
                        clip_grad=1.0, beta=[0.1, 0.5], resurrect=0.3, eta_a=0.001, eta_c=0.89, partition_size=512, head_norm=False)),
    ("paper-vitb", dict(VIT, arch="vit_base", momentum=0.996, lr=7.5e-4, min_lr=2e-6, clip_grad=0.3, epochs=400)),
    ("inat18", dict(VIT, arch="vit_small", data="inat18", epochs=300, local_crops=10)),
    # DINO's official code, as run for Table C.3: temperature .04 to .07 over 30 epochs; decoupled: its last row
    ("paper-dino", dict(DINO, teacher_temp=[0.04, 0.07], teacher_temp_epochs=30, prototypes="joint")),
    ("paper-dino-dec", dict(DINO, teacher_temp=[0.05, 0.025], teacher_temp_epochs=100, num_prototypes=2048, targets="sinkhorn",
                            prototypes="decoupled")),
    ("paper-dino-rn50", dict(arch="resnet50", optimizer="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4,
                             global_scale=[0.14, 1.0], local_scale=[0.05, 0.14], method="dino", epochs=100)),
    # CARP's official ResNet-50; CARL is the same with one block of all prototypes
    ("paper-rn50", dict(RN50, method="carp", partition_size=512, epochs=400)),
    ("paper-carl", dict(RN50, method="carl", partition_size=65536, epochs=100, prototypes="joint"))])
def test_presets_hold_the_numbers_of_the_papers(preset, values):
    args = vars(config.parse(["--preset", preset, "--device", "cpu"]))
    assert {k: args[k] for k in values} == values | ({"num_prototypes": 2048} if preset == "paper-dino-dec" else {})


def test_defaults_of_the_methods_are_the_papers():
    args = config.parse(["--method", "dino", "--device", "cpu"])  # DINO's official code: .1, .04 constant
    assert (args.head_norm, args.targets, args.student_temp, args.teacher_temp, args.teacher_temp_epochs, args.norm_last_layer) == \
           (True, "center", 0.1, [0.04, 0.04], 0, True)
    args = config.parse(["--method", "carp", "--prototypes", "kp", "--device", "cpu"])  # CARP: no temperature, raw h; KP 0.1
    assert (args.head_norm, args.logit_scale, args.kp_weight) == (False, 1.0, 0.1)
    assert config.parse(["--method", "dino", "--prototypes", "vmf", "--device", "cpu"]).targets == "prob"


def test_every_flag_is_read_somewhere_and_helped():
    code = "\n".join(text for f, text in sources().items())
    for action in config.parser()._actions:
        if action.dest != "help":
            assert action.help and re.search(rf"\b(args|a|args_)\.{action.dest}\b", code), action.dest


@pytest.mark.parametrize("tag", ["A.1", "A.2", "A.3", "A.4", "A.5", "A.6", "A.7", "Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Def. 2.1"])
def test_every_equation_stands_in_the_code(tag):
    assert any(tag in text for text in sources().values())


ARROWS = {"gmm": set(), "losses": set(), "blocks": set(), "methods": {"blocks", "losses"}, "bench": {"run", "sides"},
          "sides": {"blocks", "collapse", "data", "eval_knn", "losses", "models", "shapes", "views", "gmm"}, "ddp": set(),
          "models": set(), "config": set(), "shapes": set(),
          "views": set(), "monitor": set(), "optim": set(), "groups": set(), "data": {"groups", "shapes", "views"},
          "heads": {"gmm", "live", "losses"}, "live": set(), "transfer": {"data", "views"}, "features": {"checkpoints", "data", "guard", "models", "views"},
          "probes": {"views"}, "eval_knn": {"data", "features", "groups", "run"},
          "eval_linear": {"data", "features", "groups", "models", "probes", "transfer"}, "checkpoints": set(), "guard": {"ddp"},
          "run": {"checkpoints", "config", "ddp", "guard", "heads", "methods", "models"},
          "weights": {"checkpoints", "ddp", "eval_knn", "guard", "run"}}


@pytest.mark.parametrize("name", ARROWS)
def test_imports_point_one_way(name):
    tree = ast.parse(open(os.path.join(HERE, f"{name}.py")).read())
    ours = {f[:-3] for f in sources()}
    found = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names} | \
            {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert found & ours <= ARROWS[name]


def test_nothing_imports_train_and_files_stay_readable():
    for f, text in sources().items():
        assert f in ("train.py", "chaos.py") or not re.search(r"^\s*(import|from) train\b", text, re.M), f
        assert len(text.splitlines()) <= 320, f
        assert max(map(len, text.splitlines())) <= 120, f


def readme_commands():
    text = open(os.path.join(HERE, "README.md")).read()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    return [m.groups() for line in lines for m in re.finditer(r"\b(\w+\.py)\b([^&#]*)", re.sub(r" -- .*", "", line))]


def test_commands_of_the_readme_parse(capsys, monkeypatch):
    """train.py's are parsed; of the other tools every flag must stand in their --help."""
    commands = readme_commands()
    assert {"train.py", "collapse.py", "eval_knn.py"} <= {script for script, _ in commands}
    for script in sorted({script for script, _ in commands} - {"train.py"}):
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(os.path.join(HERE, script), run_name="__main__")
        text = capsys.readouterr().out
        assert stop.value.code == 0
        for flag in {f for s, rest in commands if s == script for f in re.findall(r"--[\w-]+", rest)}:
            assert flag in text, (script, flag)
    for script, rest in commands:
        if script == "train.py":
            config.parse(shlex.split(rest))


def test_line_counts_in_the_readme_are_right():
    text = open(os.path.join(HERE, "README.md")).read()
    for names, counts in re.findall(r"^\| *\d* *\| ((?:`\w+\.py`(?:, )?)+) \| ([\d, ]+) \|", text, re.M):
        for name, count in zip(re.findall(r"`(\w+\.py)`", names), counts.split(", ")):
            assert len(open(os.path.join(HERE, name)).read().splitlines()) == int(count), name
