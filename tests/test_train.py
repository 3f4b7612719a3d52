"""train.py by main([...]): methods and prototype sets, two processes, bad input, presets."""
import json
import os
import re
import sys
import threading

import pytest
import torch
from torchvision.utils import save_image

import collapse
import config
import data
import eval_knn
import forked
import heads
import losses
import models
import presets
import train
from conftest import (ROOT, TINY, differences, make_folder, read_checkpoint, read_log,
                      sentence_of_refusal, train_tiny)
from support import assign, ddp, optim, runs

pytestmark = pytest.mark.usefixtures("small_shapes", "small_network")
CPU = torch.device("cpu")
THREE_STEPS = ["--steps", "3", "--log-every", "1", "--eval-every", "3"]
METHODS_AND_PROTOTYPES = [(method, prototypes) for method in ("carp", "carl", "dino")
                          for prototypes in ("joint", "kp", "frozen", "decoupled", "live")]
METHODS_AND_PROTOTYPES += [("dino", "vmf"), ("dino", "clustered")]
# carl is carp with one block of all prototypes: what it keeps for a resume is the same
RESUMED = [(method, prototypes) for method, prototypes in METHODS_AND_PROTOTYPES
           if method != "carl" or prototypes == "joint"]


# ---- training ----------------------------------------------------------------------------------
@pytest.mark.parametrize("method, prototypes", METHODS_AND_PROTOTYPES)
def test_every_method_and_prototype_set_trains(tmp_path, method, prototypes):
    metrics = train_tiny(tmp_path, *THREE_STEPS, "--method", method, "--prototypes", prototypes)
    assert 0 <= metrics["knn"] <= 100
    assert set(metrics["unique"]) == {0.025, 0.5}
    assert 0 < metrics["used"] <= 1
    assert metrics["drift"] >= 0
    ckpt = read_checkpoint(tmp_path)
    assert ckpt["step"] == 3
    for network in ("student", "teacher"):
        assert all(name.startswith(("backbone.", "head.")) for name in ckpt[network])
    assert ckpt["prototypes"]["vectors"].shape == (16, 8)
    moved = not torch.equal(ckpt["prototypes"]["vectors"], ckpt["prototypes"]["start"])
    assert moved == (prototypes != "frozen")
    assert bool(ckpt["gmm"]) == (prototypes in ("decoupled", "live"))
    with open(tmp_path / "args.json") as file:
        written = json.load(file)
    for args in (ckpt["args"], written):
        assert args["method"] == method
        assert args["prototypes"] == prototypes
        assert args["script"] == "train.py"

    log = read_log(tmp_path)
    assert [row["step"] for row in log] == ["0", "1", "2", "3"]
    assert 0 <= float(log[0]["raw_knn"]) <= 100
    assert log[0]["knn"]
    assert (float(log[-1]["penalty"]) != 0) == (prototypes == "kp")


@pytest.mark.parametrize("method, terms", [("carp", {"consistency", "entropy"}),
                                           ("dino", {"cross_entropy"})])
@pytest.mark.parametrize("prototypes, columns", [
    ("joint", set()), ("decoupled", {"eta", "pi_max", "mixture_used", "resurrected"})])
def test_the_log_has_the_columns_of_the_loss_and_of_the_prototypes(tmp_path, method, terms,
                                                                   prototypes, columns):
    """No other columns, and the loss is the sum of its terms. The mixture starts at step 1."""
    train_tiny(tmp_path, *THREE_STEPS, "--method", method, "--prototypes", prototypes)
    log = read_log(tmp_path)
    of_losses = {"consistency", "entropy", "cross_entropy"}
    of_mixtures = {"eta", "pi_max", "mixture_used", "resurrected"}
    assert log[0].keys() & of_losses == terms
    assert log[0].keys() & of_mixtures == columns
    for row in log[1:]:
        total = sum(float(row[term]) for term in terms | {"penalty"})
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
    for column in columns:
        assert [row[column] != "" for row in log] == [False, False, True, True]


def test_same_seed_same_losses_and_another_seed_others(tmp_path):
    losses = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_tiny(tmp_path / name, *THREE_STEPS, "--seed", seed)
        losses[name] = [row["loss"] for row in read_log(tmp_path / name)]
    assert losses["a"] == losses["b"] != losses["c"]


def test_teacher_starts_as_the_student_and_shares_no_storage():
    args = config.parse([*TINY, "--prototypes", "joint"])
    student, teacher, protos_s, protos_t = train.networks(args, CPU, 0)
    of_student = [*student.parameters(), *protos_s.parameters()]
    of_teacher = [*teacher.parameters(), *protos_t.parameters()]
    assert len(of_student) == len(of_teacher) > 20
    for theta, phi in zip(of_student, of_teacher):
        assert torch.equal(theta, phi)
        assert theta.data_ptr() != phi.data_ptr()
        assert theta.requires_grad and not phi.requires_grad


def test_prototypes_without_gradients_are_one_object_for_student_and_teacher():
    _, _, protos_s, protos_t = train.networks(config.parse(TINY), CPU, 0)
    assert protos_s is protos_t


@pytest.mark.parametrize("prototypes", ["joint", "decoupled", "live"])
def test_one_step_moves_what_it_should(tmp_path, prototypes):
    """Every parameter of the student moves, and the teacher (1 - m) of the way to it.

    Prototypes move by gradient or by the mixture.
    """
    flags = ["--prototypes", prototypes, "--steps", "40", "--gmm-start", "0",
             "--momentum", "0.9", "--stop-at", "1"]
    student = train.networks(config.parse([*TINY, *flags]), CPU, 0)[0]
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    train_tiny(tmp_path, *flags, "--warmup-epochs", "0")
    ckpt = read_checkpoint(tmp_path)
    # the bias of the keys and a bias before a batch norm have no gradient
    without_gradient = ("backbone.blocks.0.attn.qkv.bias", "head.mlp.0.bias", "head.mlp.3.bias")
    for name, before in start.items():
        change = ckpt["student"][name] - before
        if name not in without_gradient:
            assert change.abs().max() > 0, name
        assert torch.allclose(ckpt["teacher"][name] - before, 0.1 * change, atol=1e-6), name
    # the first step of live gets the very vectors that its means start from, and which stay there
    unmoved = torch.equal(ckpt["prototypes"]["vectors"], ckpt["prototypes"]["start"])
    assert unmoved == (prototypes == "live")


def test_accumulation_gives_the_mixture_the_whole_batch(tmp_path):
    """All teacher vectors come before the mixture's update.

    So, without batch norm, 4 micro-batches give the mixture and the losses of one.
    """
    for accum in ("1", "4"):
        train_tiny(tmp_path / accum, *THREE_STEPS, "--accum", accum, "--no-head-bn",
                   "--gmm-start", "0")
    mu_1, mu_4 = (read_checkpoint(tmp_path / accum)["gmm"]["mu"] for accum in "14")
    assert torch.allclose(mu_1, mu_4, atol=1e-5)
    loss_1, loss_4 = (float(read_log(tmp_path / accum)[1]["consistency"]) for accum in "14")
    assert loss_1 == pytest.approx(loss_4, rel=1e-5)


@pytest.mark.parametrize("method, prototypes", RESUMED)
def test_six_steps_are_three_and_three_resumed_to_the_bit(tmp_path, method, prototypes):
    flags = [*THREE_STEPS, "--steps", "6", "--method", method, "--prototypes", prototypes]
    train_tiny(tmp_path / "whole", *flags)
    train_tiny(tmp_path / "parts", *flags, "--stop-at", "3")
    train_tiny(tmp_path / "parts", *flags, "--resume")
    whole, parts = (read_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert not differences(whole, parts)
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts")


def test_a_resnet_and_a_folder_without_labels(tmp_path):
    """There is no k-NN without labels, but prototypes are measured all the same."""
    os.makedirs(tmp_path / "images")
    for i in range(24):
        save_image(torch.rand(3, 32, 32), tmp_path / "images" / f"{i}.png")
    metrics = train_tiny(tmp_path / "out", *THREE_STEPS, "--data", tmp_path / "images",
                         "--arch", "resnet18", "--steps", "2", "--img-size", "16",
                         "--local-size", "8")
    assert metrics["knn"] is None
    assert "unique" in metrics


def test_compiled_backbones_keep_their_names_and_compute_the_same(tmp_path, monkeypatch):
    compiled = []
    original = torch.nn.Module.compile

    def compile_eagerly(net):  # the same graph, without a compiler's minute
        compiled.append(net.arch)
        original(net, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    # one size of crops and of the evaluation's batches, as each other one is traced anew
    flags = [*THREE_STEPS, "--local-crops", "0", "--eval-bank", "16", "--eval-queries", "16"]
    plain = train_tiny(tmp_path / "plain", *flags)
    assert not compiled
    metrics = train_tiny(tmp_path / "compiled", *flags, "--compile")
    assert compiled == ["vit_nano", "vit_nano"]
    assert metrics["unique"] == plain["unique"]
    a, b = (read_checkpoint(tmp_path / name) for name in ("plain", "compiled"))
    for network in ("student", "teacher"):
        assert a[network].keys() == b[network].keys()
        for name, value in a[network].items():
            assert torch.allclose(value, b[network][name], atol=1e-5), name


def test_a_compiler_that_fails_is_named(tmp_path, capsys, monkeypatch):
    original = torch.nn.Module.compile

    def broken(graph, inputs):
        raise ValueError("no compiler")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: original(net, backend=broken))
    torch.compiler.reset()
    sentence = sentence_of_refusal(capsys, tmp_path, "--compile")
    assert "--compile does not work here" in sentence


# ---- two processes -----------------------------------------------------------------------------
# flags, and how far one and two processes may be apart: batch norm and AdamW enlarge rounding
CASES = [("--prototypes decoupled", 1e-4),
         ("--prototypes joint", 1e-4),
         ("--prototypes live --method dino --targets sinkhorn", 1e-4),
         ("--prototypes decoupled --no-head-bn --gmm-start 0.5 --lr 1e-5", 1e-6),
         ("--prototypes kmeans --method deepcluster --steps 6 --optimizer sgd", 1e-4),
         ("--prototypes clustered --student-prototypes joint", 1e-4),
         ("--prototypes bank --method sop --memory 30", 1e-4),
         ("--prototypes frozen --method carp-uniform --no-head-bn --lr 1e-5", 1e-6),
         ("--prototypes joint --method swav --queue 12 --optimizer sgd", 1e-4)]
ALL_ON_TWO = """
import sys
sys.path.insert(0, {root!r})
import models
import train
from support import ddp
models.VITS.update({networks!r})  # those of the one process
leave_group = ddp.cleanup
ddp.cleanup = lambda: None  # one process group for all runs but the last
runs = {runs!r}  # the flags of each
for flags in runs[:-1]:
    train.main(flags)
ddp.cleanup = leave_group
train.main(runs[-1])
"""


def test_two_processes_equal_one(tmp_path):
    """Global batch, batch norm, entropy, gradients and mixture: the losses of one process.

    All cases are one test, since to start two processes takes longer than such a run.
    """
    images = make_folder(tmp_path / "set", 32)

    def all_flags(processes):
        return [[*TINY, *THREE_STEPS, "--steps", "4", "--data", images,
                 "--out", str(tmp_path / f"{case}-{processes}"), *flags.split()]
                for case, (flags, _) in enumerate(CASES)]

    script = tmp_path / "two.py"
    script.write_text(ALL_ON_TWO.format(root=ROOT, networks=models.VITS, runs=all_flags(2)))
    done = forked.run_two([sys.executable, script])
    assert done.returncode == 0, done.stderr[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for flags in all_flags(1):
            train.main(flags)
    finally:
        torch.set_num_threads(threads)
    for case, (flags, within) in enumerate(CASES):
        have_equal_losses_and_weights(tmp_path / f"{case}-1", tmp_path / f"{case}-2", flags, within)


def have_equal_losses_and_weights(one, two, flags, within):
    for row_1, row_2 in zip(read_log(one)[1:], read_log(two)[1:], strict=True):
        assert row_1.keys() == row_2.keys(), flags
        for term in ("consistency", "entropy", "cross_entropy", "penalty", "loss"):
            if term in row_1:  # six digits are written
                expected = pytest.approx(float(row_1[term]), rel=max(within, 1e-5), abs=1e-6)
                assert float(row_2[term]) == expected, (flags, term)
    a, b = read_checkpoint(one), read_checkpoint(two)
    name = "memory" if "bank" in flags else "vectors"
    C = a["prototypes"][name]
    longest = min(1.0, float(C.abs().max()))
    assert torch.allclose(C, b["prototypes"][name], rtol=0, atol=within * longest), flags
    for name, value in a["teacher"].items():
        assert torch.allclose(value.float(), b["teacher"][name].float(), atol=2e-3), (flags, name)


def test_batch_norm_over_two_processes_counts_every_row_once(monkeypatch):
    """Two threads stand for processes with 3 and 7 rows, as patches have; torch's batch norm of all
    10 rows is the oracle, gradients included."""
    rank, at_once, given = threading.local(), threading.Barrier(2, timeout=60), [None, None]

    def all_reduce(x, op="sum"):
        given[rank.number] = x.clone()
        at_once.wait()
        x.copy_(given[0] + given[1])
        at_once.wait()
        return x
    monkeypatch.setattr(ddp, "all_reduce", all_reduce)
    monkeypatch.setattr(ddp, "WORLD", 2)
    generator = torch.Generator().manual_seed(0)
    x = 2 + torch.randn(10, 4, generator=generator)
    w = torch.randn(10, 4, generator=generator)  # of each output in a loss
    found = [None, None]

    def process(number, rows):
        rank.number = number
        norm = ddp.sync_batchnorm(torch.nn.BatchNorm1d(4))
        part = x[rows].clone().requires_grad_()
        y = norm(part)
        (y * w[rows]).sum().backward()
        found[number] = y.detach(), part.grad, norm.running_mean, norm.running_var
    threads = [threading.Thread(target=process, args=(number, rows))
               for number, rows in enumerate((slice(0, 3), slice(3, 10)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole, norm = x.clone().requires_grad_(), torch.nn.BatchNorm1d(4)
    y = norm(whole)
    (y * w).sum().backward()
    assert torch.allclose(torch.cat([y for y, *_ in found]), y.detach(), atol=1e-5)
    assert torch.allclose(torch.cat([g for _, g, *_ in found]), whole.grad, atol=1e-5)
    for *_, mean, var in found:
        assert torch.allclose(mean, norm.running_mean, atol=1e-6)
        assert torch.allclose(var, norm.running_var, atol=1e-6)


# ---- bad input ---------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, sentence", [
    ("--preset nope", "nope"),
    ("--method nope", "nope"),
    ("--batch 8", "unrecognized arguments: --batch"),
    ("--img-size 36", "--img-size 36 must be a multiple of --patch-size 8"),
    ("--prototypes vmf",
     "--prototypes vmf has concentrations in units of DINO's temperatures; got --method carp"),
    ("--method dino --num-prototypes 1", "--num-prototypes must be at least 2, got 1"),
    ("--method dino --teacher-temp 0 0.04", "--teacher-temp must be positive, got 0.0 0.04"),
    ("--method dino --teacher-temp 0.05 0.04",
     "--teacher-temp 0.05 0.04: START counts only with --teacher-temp-epochs"),
    ("--method sop --prototypes bank --teacher-temp 0.05 0.04", "START counts only with"),
    ("--prototypes joint --beta 1 1",
     "--beta changes nothing with --prototypes joint; it is for decoupled (READ_BY_... in "
     "config.py says who reads it); got [1.0, 1.0]"),
    ("--prototypes live --eta-a 0.1",
     "--eta-a changes nothing with --prototypes live; it is for decoupled"),
    ("--kp-weight 0.1",
     "--kp-weight changes nothing with --prototypes decoupled; it is for joint, kp, vmf"),
    ("--student-temp 0.05", "--student-temp changes nothing with --method carp; it is for dino"),
    ("--method swav --targets prob", "--targets changes nothing with --method swav; it is for"),
    ("--imbalance-law power", "--imbalance-law changes nothing with --imbalance 1; got power"),
    ("--method dino --teacher-temp-epochs 3",
     "--teacher-temp-epochs changes nothing with --teacher-temp 0.025 0.025; got 3"),
    ("--method dino --teacher-temp 0.04 0.04 --teacher-temp-epochs 3",
     "--teacher-temp-epochs changes nothing with --teacher-temp 0.04 0.04; got 3"),
    ("--method dino --teacher-temp 0.05 0.04 --resume", "START counts only with"),  # no run there
    ("--epochs 2", "--epochs changes nothing with --steps 6; got 2.0"),
    ("--local-crops 0 --local-scale 0.1 0.3", "--local-scale changes nothing with --local-crops 0"),
    ("--local-crops 0 --local-size 24", "--local-size changes nothing with --local-crops 0"),
    ("--arch resnet18 --patch-size 4", "--patch-size changes nothing with --arch resnet18; got 4"),
    ("--jitter-p 0 --jitter 0.1 0.1 0.1 0.1", "--jitter changes nothing with --jitter-p 0"),
    ("--resurrect 0 --no-rescale", "--rescale changes nothing with --resurrect 0; got False"),
    ("--partition-size 5", "--num-prototypes 16 must be a multiple of --partition-size 5"),
    ("--eta-c 1.2",
     "--eta-c must lie in (0, 0.99), the range in which A.7 rises to 0.99, got 1.2"),
    ("--beta 0.1 1.5", "--beta must lie in [0, 1], got 0.1 1.5"),
    ("--lr nan", "--lr must be positive, got nan"),
    ("--batch-size 9 --accum 2", "--batch-size 9 must be a multiple of --accum 2"),
    ("--batch-size 101", "--batch-size 101 is more than the 100 images"),
    ("--stop-at 9", "--stop-at 9 lies beyond"),
    ("--data nowhere", "--data nowhere is neither a folder nor one of the sets"),
    ("--device tpu", "--device must be auto"),
    ("--imbalance 0.5", "--imbalance"),
    ("--global-scale 0.9 0.2", "--global-scale needs"),
    ("--patch-size 4", "--arch vit_nano has a stem of patch size 8, got --patch-size 4"),
])
def test_bad_flags_get_one_sentence_and_exit_code_2(capsys, tmp_path, flags, sentence):
    assert sentence in sentence_of_refusal(capsys, tmp_path, *flags.split())
    assert not os.path.exists(tmp_path / "ckpt.pt")


class Biased(heads.Frozen):
    def bias(self, tau):
        return torch.arange(16.) / tau


def test_a_bias_that_the_method_does_not_read_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(heads.PROTOTYPES, "mine", Biased)
    assert sentence_of_refusal(capsys, tmp_path, "--prototypes", "mine").endswith(
        "--prototypes mine has a `bias`, which --method carp does not read (`reads_bias` of its "
        "class)")
    train_tiny(tmp_path, "--prototypes", "mine", "--method", "dino", "--steps", "1")


class ReadsBias(losses.CARPLoss):
    """A loss that says of itself that it reads a bias; with vMF it is not refused then."""
    reads_bias = True


def test_a_loss_may_say_that_it_reads_a_bias(tmp_path, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "mine", ReadsBias)
    train_tiny(tmp_path, "--prototypes", "vmf", "--method", "mine", "--steps", "1")


class TermFromStepThree(losses.CARPLoss):
    def forward(self, h_s, h_t, protos_s, protos_t, step):
        terms = super().forward(h_s, h_t, protos_s, protos_t, step)
        return terms | {"late": h_s.square().mean() if step > 2 else 0}


def test_a_term_that_does_not_count_yet_may_be_the_number_0(tmp_path, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "mine", TermFromStepThree)
    monkeypatch.setattr(heads.Frozen, "penalty", lambda self: 0)
    train_tiny(tmp_path, "--prototypes", "frozen", "--method", "mine", "--log-every", "1")
    late = [float(row["late"]) for row in read_log(tmp_path) if row["late"]]
    assert late[:3] == [0, 0, 0] and min(late[3:]) > 0


@pytest.mark.parametrize("name", ["drift", "used", "patch_used"])
def test_a_set_reports_no_column_that_an_evaluation_fills(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(heads.Frozen, "step", lambda self, h, step, beta=0.5: {name: 0.5})
    assert f"{name!r} is a column of log.csv that the loop fills" in sentence_of_refusal(
        capsys, tmp_path, "--prototypes", "frozen", "--log-every", "1")
    assert len(read_log(tmp_path)) == 1  # the row of the controls: it was the first step


def test_a_name_that_no_flag_has_in_the_lists_of_what_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(config.READ_BY_PROTOTYPES, "frozen", "my-flag")
    assert ("READ_BY_METHODS or READ_BY_PROTOTYPES in config.py names 'my-flag', and there is no "
            "such flag") in sentence_of_refusal(capsys, tmp_path)


@pytest.mark.parametrize("flags, said", [(["--workers", "2"], True), ([], False)])
def test_workers_that_have_nothing_to_decode_are_mentioned(capsys, tmp_path, flags, said):
    train_tiny(tmp_path, "--steps", "1", "--prototypes", "frozen", *flags)
    line = "--workers 2 is not used, as the images lie in memory"
    assert (line in capsys.readouterr().out) == said


class WithPredictor(losses.CARPLoss):
    """CARP on what a layer of the loss makes of the student's vectors."""

    def __init__(self, *args):
        super().__init__(*args)
        self.predictor = torch.nn.Linear(8, 8)
        self.start = self.predictor.weight.detach().clone()

    def forward(self, h_s, *others):
        return super().forward(self.predictor(h_s), *others)


def test_the_tools_assign_images_with_the_beta_of_the_end_of_a_run(tmp_path, monkeypatch):
    train_tiny(tmp_path, "--beta", "0.2", "0.9", "--steps", "2")
    seen, original = set(), heads.Decoupled.assign
    monkeypatch.setattr(heads.Decoupled, "assign", lambda protos, h, beta=0.5, *others: (
        seen.add(beta), original(protos, h, beta, *others))[1])
    eval_knn.winners(tmp_path, data.load("shapes")[1])
    assert seen == {0.9}
    seen.clear()
    assign.assign_images(str(tmp_path), "shapes", collapse.usage)
    assert seen == {0.9}


class NamedPenalty(losses.CARPLoss):
    def forward(self, *args):
        return super().forward(*args) | {"penalty": args[0].sum()}


class ReportsRate(heads.Frozen):
    def step(self, h, step, beta=0.5):
        return {"lr": h.norm(dim=1).mean()}


@pytest.mark.parametrize("table, name, kind, flags", [
    (losses.LOSSES, "penalty", NamedPenalty, ["--method", "mine", "--prototypes", "frozen"]),
    (heads.PROTOTYPES, "lr", ReportsRate, ["--prototypes", "mine"])])
def test_a_name_that_is_taken_in_the_log_is_refused(tmp_path, capsys, monkeypatch, table, name,
                                                    kind, flags):
    monkeypatch.setitem(table, "mine", kind)
    assert f"two values have the name {name!r} in log.csv" in sentence_of_refusal(
        capsys, tmp_path, *flags)


@pytest.mark.parametrize("name, sentence", [
    ("step", "'step' is a column of log.csv that the loop fills"),
    ("drift", "'drift' is a column of log.csv that the loop fills"),
    ("loss_over_ln_k", "two values have the name 'loss_over_ln_k'")])
def test_a_name_that_the_loop_fills_is_refused(tmp_path, capsys, monkeypatch, name, sentence):
    class Named(losses.CARPLoss):
        def forward(self, *args):
            return super().forward(*args) | {name: args[0].sum()}
    monkeypatch.setitem(losses.LOSSES, "mine", Named)
    assert sentence in sentence_of_refusal(capsys, tmp_path, "--method", "mine", "--prototypes",
                                           "frozen")


class TakesInAndSaysNothing(heads.Frozen):
    def step(self, h, step, beta=0.5):
        self.start.lerp_(h.mean(0), 1e-3)  # and returns None


class OneTerm(losses.CARPLoss):
    def forward(self, *args):
        return sum(super().forward(*args).values())


class Half(heads.Frozen):
    def vectors(self):
        return self.start[::2]


@pytest.mark.parametrize("table, kind, flags, sentence", [
    (heads.PROTOTYPES, TakesInAndSaysNothing, ["--prototypes", "mine"],
     "step() of a prototype set {column of log.csv: number}, {} if it has nothing to report; got a "
     "NoneType"),
    (losses.LOSSES, OneTerm, ["--method", "mine", "--prototypes", "frozen"],
     "a loss returns {name of a term: value}, and"),
    (heads.PROTOTYPES, Half, ["--prototypes", "mine"],
     "--prototypes mine has vectors() of shape (8, 8), where --num-prototypes and "
     "--bottleneck-dim ask for (16, 8)")])
def test_a_class_that_returns_something_else_is_refused(tmp_path, capsys, monkeypatch, table, kind,
                                                        flags, sentence):
    monkeypatch.setitem(table, "mine", kind)
    assert sentence in sentence_of_refusal(capsys, tmp_path, *flags)


@pytest.mark.parametrize("prototypes", ["joint", "decoupled"])
def test_the_parameters_of_a_loss_are_trained(tmp_path, monkeypatch, prototypes):
    made = []

    class Kept(WithPredictor):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
    monkeypatch.setitem(losses.LOSSES, "mine", Kept)
    train_tiny(tmp_path, "--method", "mine", "--prototypes", prototypes, "--lr", "1",
               "--momentum", "0", "--momentum-end", "0")
    loss, ckpt = made[-1], read_checkpoint(tmp_path)
    assert (loss.predictor.weight - loss.start).abs().max() > 1e-4
    assert torch.equal(ckpt["loss"]["predictor.weight"], loss.predictor.weight.detach())
    # without momentum the teacher is the student, and the loss is in neither
    for name, parameter in runs.networks_of(ckpt)[0].named_parameters():
        assert torch.equal(parameter, ckpt["student"][name]), name
    if prototypes == "joint":
        sets = ckpt["prototypes"]
        assert torch.equal(sets["teacher"]["weight"], sets["student"]["weight"])


def test_a_term_that_comes_or_goes_with_the_step_is_one_sentence(tmp_path, capsys, monkeypatch):
    class Late(losses.CARPLoss):
        def forward(self, h_s, h_t, protos_s, protos_t, step):
            terms = super().forward(h_s, h_t, protos_s, protos_t, step)
            return terms | {"spread": h_s.square().mean()} if step > 2 else terms
    monkeypatch.setitem(losses.LOSSES, "mine", Late)
    sentence = sentence_of_refusal(capsys, tmp_path, "--method", "mine")
    assert ("has the terms consistency, entropy, spread, penalty, loss after a step with "
            "consistency, entropy, penalty, loss: where a term does not count, return") in sentence
    train_tiny(tmp_path / "b", "--stop-at", "3")  # between two rows, whose means count this step
    monkeypatch.setitem(losses.LOSSES, "carp", Late)
    assert "has the terms consistency, entropy, spread" in sentence_of_refusal(
        capsys, tmp_path / "b", "--resume")


def test_a_law_that_is_added_to_its_table_can_be_chosen(monkeypatch):
    monkeypatch.setitem(data.LAWS, "flat", lambda c, C: 0.0)
    args = config.parse(["--imbalance", "2", "--imbalance-law", "flat"])
    assert args.imbalance_law == "flat"


def test_folders_without_images_or_with_one_class(capsys, tmp_path):
    out = tmp_path / "out"
    os.makedirs(tmp_path / "empty")
    assert "train/<class>" in sentence_of_refusal(capsys, out, "--data", tmp_path / "empty")
    os.makedirs(tmp_path / "one" / "cat")
    save_image(torch.rand(3, 32, 32), tmp_path / "one" / "cat" / "a.png")
    sentence = sentence_of_refusal(capsys, out, "--data", tmp_path / "one")
    assert re.search("(one|a single) class", sentence)


def test_a_run_is_never_written_over(capsys, tmp_path):
    train_tiny(tmp_path, *THREE_STEPS)
    flags = ["--resume", *THREE_STEPS]
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert "already holds a run" in sentence_of_refusal(capsys, tmp_path, *THREE_STEPS)
    sentence = sentence_of_refusal(capsys, tmp_path, *flags, "--num-prototypes", "32")
    assert "--num-prototypes 16 -> 32" in sentence
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    (tmp_path / "ckpt.pt").write_bytes(before[:1000])
    sentence = sentence_of_refusal(capsys, tmp_path, *flags)
    assert "holds no complete checkpoint of ours" in sentence


def test_resume_needs_no_flag_typed_again(capsys, tmp_path):
    flags = ["--method", "dino", "--prototypes", "kp", "--steps", "4", "--lr", "0.01"]
    train_tiny(tmp_path / "parts", *flags, "--stop-at", "2")
    train.main(["--out", str(tmp_path / "parts"), "--resume", "--device", "cpu"])
    train_tiny(tmp_path / "whole", *flags)
    parts, whole = (read_checkpoint(tmp_path / name) for name in ("parts", "whole"))
    assert parts["step"] == 4
    assert not differences(parts, whole)
    sentence = sentence_of_refusal(capsys, tmp_path / "parts", "--resume", "--preset", "cifar10")
    assert "--preset tiny -> cifar10" in sentence


def test_resume_finds_the_flags_of_a_run_in_the_folder_that_nobody_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs" / "tiny-dino-decoupled-s3"
    out.mkdir(parents=True)
    (out / "args.json").write_text('{"epochs": 8.0, "eval_bank": 7}')
    args = config.parse(["--method", "dino", "--seed", "3", "--resume", "--eval-bank", "9"])
    assert (args.epochs, args.eval_bank, args.out) == (8, 9, "runs/tiny-dino-decoupled-s3")
    assert config.parse(["--method", "dino", "--seed", "3"]).epochs != 8


@pytest.mark.parametrize("text, sentence", [
    ("[1]", "does not hold the flags of a run"),
    ('{"method": "foo"}', "says --method foo, and this code has no such choice"),
    ('{"lr": null}', "says lr = None, which cannot be"),
    ('{"beta": 3}', "says beta = 3, which cannot be"),
    ('{"script": 5}', "says script = 5, which cannot be"),
])
def test_resume_refuses_an_args_json_that_train_did_not_write(capsys, tmp_path, text, sentence):
    train_tiny(tmp_path, *THREE_STEPS, "--stop-at", "2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "args.json").write_text(text)
    assert sentence in sentence_of_refusal(capsys, tmp_path, "--resume")
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_resume_goes_on_with_the_script_of_the_run_alone(capsys, tmp_path):
    """Another script's phases would mix with those of the run."""
    train_tiny(tmp_path, *THREE_STEPS, "--stop-at", "2")
    ckpt = read_checkpoint(tmp_path)
    ckpt["args"]["script"] = "zoo/mine.py"
    torch.save(ckpt, tmp_path / "ckpt.pt")
    words = "is of a run of zoo/mine.py, not of train.py: go on with python -m zoo.mine --resume"
    assert words in sentence_of_refusal(capsys, tmp_path, *THREE_STEPS, "--resume")
    args = json.loads((tmp_path / "args.json").read_text()) | {"script": "zoo/mine.py"}
    (tmp_path / "args.json").write_text(json.dumps(args))
    assert f"args.json {words}" in sentence_of_refusal(capsys, tmp_path, "--resume")


def test_targets_that_accumulation_cannot_share_out_are_refused(capsys, tmp_path, monkeypatch):
    """Micro-batches without targets would not count, and nobody would see it."""
    class Broadcasts(losses.Loss):
        def targets(self, h_t, protos_t, step):
            return h_t.mean(1, keepdim=True)  # (2, 1, D)

        def forward(self, h_s, targets, protos_s, protos_t, step):
            return {"distance": (h_s - targets.mean(0)).square().mean()}
    monkeypatch.setitem(losses.LOSSES, "carp", Broadcasts)
    sentence = sentence_of_refusal(capsys, tmp_path, *THREE_STEPS, "--accum", "4")
    assert "zip() argument 2 is shorter than argument 1 (train.py, line " in sentence


def test_any_optimiser_may_stand_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "rmsprop", torch.optim.RMSprop)
    train_tiny(tmp_path, *THREE_STEPS, "--optimizer", "rmsprop")
    assert read_checkpoint(tmp_path)["step"] == 3


# ---- trouble in training -----------------------------------------------------------------------
def test_a_loss_that_rests_is_named_once(capsys, tmp_path):
    """Logits of nearly 0 leave the loss at ln P."""
    train_tiny(tmp_path, "--logit-scale", "1e-6", "--log-every", "1", "--eval-every", "2")
    assert capsys.readouterr().out.count("stays at 1.000 of its value at the start") == 1


def test_a_dead_mixture_is_named_once(capsys, tmp_path):
    """A mixture that starts from random directions leaves nearly all of its components unused."""
    train_tiny(tmp_path, "--steps", "40", "--gmm-start", "0", "--num-prototypes", "1024",
               "--log-every", "1", "--eval-every", "20")
    out = capsys.readouterr().out
    assert out.count("components are the most responsible one for any image") == 1
    assert out.count("remark, step") == 1 and "most of the mixture is unused" not in out


def test_a_run_that_diverges_ends_with_the_cause_and_saves_nothing(capsys, tmp_path):
    sentence = sentence_of_refusal(capsys, tmp_path, "--lr", "4e9", "--warmup-epochs", "0",
                                   "--prototypes", "frozen")
    assert re.search("three steps in a row, up to 4, were skipped; step 2 is not finite: "
                     "consistency nan.*lower --lr", sentence)
    assert not os.path.exists(tmp_path / "ckpt.pt")


# ---- presets and defaults ----------------------------------------------------------------------
def test_help_needs_no_network_and_names_every_default():
    done = forked.run([sys.executable, os.path.join(ROOT, "train.py"), "--help"],
                      capture_output=True, check=True)
    assert "--num-prototypes" in done.stdout
    assert "default: 1024" in done.stdout


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets_parse_and_hold_legal_values(preset):
    actions = {action.dest: action for action in config.parser()._actions}
    for name, value in presets.PRESETS[preset].items():
        action = actions[name]
        assert not action.choices or value in action.choices
        assert not action.nargs or len(value) == action.nargs
    config.parse(["--preset", preset, "--device", "cpu"])


VIT = dict(patch_size=16, num_prototypes=65536, bottleneck_dim=256, weight_decay=0.04,
           weight_decay_end=0.4, warmup_epochs=10, optimizer="adamw", head_bn=False,
           head_hidden=2048, drop_path=0.1, batch_size=1024)
DINO = dict(VIT, arch="vit_small", method="dino", head_norm=True, student_temp=0.1,
            targets="center", lr=5e-4, min_lr=1e-6, momentum=0.996, clip_grad=3.0,
            freeze_prototypes=1, norm_last_layer=True, epochs=100, local_crops=6)
RN50 = dict(arch="resnet50", optimizer="lars", lr=0.45, min_lr=0.0048, warmup_epochs=0,
            weight_decay=1e-6, weight_decay_end=1e-6, momentum=0.99, clip_grad=0,
            global_scale=[0.2, 1.0], local_scale=[0.05, 0.2], local_crops=6, head_bn=True,
            head_norm=False, num_prototypes=65536)
PAPERS = {
    # Table B.1, and the settings of the mixture in B.1 and A.2
    "paper-vits": dict(VIT, arch="vit_small", momentum=0.992, global_scale=[0.32, 1.0],
                       local_scale=[0.05, 0.32], lr=5e-4, min_lr=1e-6, clip_grad=1.0,
                       beta=[0.1, 0.5], resurrect=0.3, eta_a=0.001, eta_c=0.89,
                       partition_size=512, head_norm=False),
    "paper-vitb": dict(VIT, arch="vit_base", momentum=0.996, lr=7.5e-4, min_lr=2e-6,
                       clip_grad=0.3, epochs=400),
    "inat18": dict(VIT, arch="vit_small", data="inat18", epochs=300, local_crops=10),
    # DINO's official code, as run for Table C.3: temperature .04 to .07 over 30 epochs
    "paper-dino": dict(DINO, teacher_temp=[0.04, 0.07], teacher_temp_epochs=30,
                       prototypes="joint"),
    # last row of Table C.3
    "paper-dino-dec": dict(DINO, teacher_temp=[0.05, 0.025], teacher_temp_epochs=100,
                           targets="sinkhorn", prototypes="decoupled", num_prototypes=2048),
    "paper-dino-rn50": dict(arch="resnet50", optimizer="sgd", lr=0.03, weight_decay=1e-4,
                            weight_decay_end=1e-4, global_scale=[0.14, 1.0],
                            local_scale=[0.05, 0.14], method="dino", epochs=100),
    "paper-swav": dict(arch="resnet50", optimizer="lars", lr=4.8 * 256 / 4096, min_lr=0.0048,
                       weight_decay=1e-6, warmup_epochs=10, epochs=400, batch_size=4096,
                       num_prototypes=3000, bottleneck_dim=128, head_norm=True, student_temp=0.1,
                       teacher_temp=[0.05, 0.05], momentum=0, momentum_end=0, queue=0,
                       jitter=[0.8, 0.8, 0.8, 0.2], global_scale=[0.14, 1.0]),
    "paper-deepcluster": dict(method="deepcluster", prototypes="kmeans", epochs=800,
                              num_prototypes=3000, momentum=0),
    # CARP's official ResNet-50; CARL is the same with one block of all prototypes
    "paper-rn50": dict(RN50, method="carp", partition_size=512, epochs=400),
    "paper-carl": dict(RN50, method="carl", partition_size=65536, epochs=100,
                       prototypes="joint"),
}


@pytest.mark.parametrize("preset", PAPERS)
def test_presets_hold_the_numbers_of_the_papers(preset):
    args = vars(config.parse(["--preset", preset, "--device", "cpu"]))
    assert {name: args[name] for name in PAPERS[preset]} == PAPERS[preset]


def test_defaults_of_the_methods_are_the_papers():
    args = config.parse(["--method", "dino", "--device", "cpu"])  # DINO's official code
    assert args.head_norm is True
    assert args.targets == "center"
    assert args.student_temp == 0.1
    assert args.teacher_temp == [0.025, 0.025]  # constant; 0.04 in DINO, see losses.py
    assert args.teacher_temp_epochs == 0
    assert args.norm_last_layer is True
    args = config.parse(["--method", "carp", "--prototypes", "kp", "--device", "cpu"])
    assert args.head_norm is False  # CARP takes h as it is, without a temperature
    assert args.logit_scale == 1.0
    assert args.kp_weight == 0.1  # B.1
    args = config.parse(["--method", "dino", "--prototypes", "vmf", "--device", "cpu"])
    assert args.targets == "prob"
