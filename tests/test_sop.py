"""zoo/sop.py: memories, anchors and the loss of patches beside hand-worked cases, and as a run."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import collapse
from conftest import TINY, compare_one_process_with_two, differences, read_checkpoint, read_log
from zoo import ibot, sop
from zoo.bank import Bank

pytestmark = pytest.mark.usefixtures("small_shapes", "small_network")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=-1)


def run(out, *flags):
    return sop.main([*TINY, "--out", str(out), *map(str, flags)])


def anchors_alone(vectors):
    """A Bank with these vectors (K, D) as anchors, in this order, and no neighbours."""
    K, D = vectors.shape
    bank = Bank(K, D, M=K, k=0, B=1)
    bank.memory.copy_(vectors)
    bank.draw(0)
    order = (vectors @ bank.members[:, 0].T).argmax(1)
    assert torch.equal(bank.members[order, 0], vectors)
    bank.members = bank.members[order]
    return bank


def drawn_bank(K, D, M, k, seed=3):
    bank = Bank(K, D, seed=seed, M=M, k=k, B=4)
    for step in range(3):
        bank.step(randn(8, D, seed=step), step)
    return bank


def weights_of(hidden):
    """(crop of each row (m,), weights (m,)) of masks hidden (crops, n): 1 / max(n, 1) per crop."""
    crop_of, weights = [], []
    for crop, mask in enumerate(hidden.tolist()):
        crop_of += [crop] * sum(mask)
        weights += [1 / max(sum(mask), 1) / len(hidden)] * sum(mask)
    return crop_of, torch.tensor(weights)


def probabilities(u, members, s, tau):
    """S.3 and S.4 in float64 loops: u (D,), members (K, k + 1, D), s (K, k + 1) -> P (K,)."""
    K, per_sop, _ = members.shape
    e = torch.stack([(u @ members[j, i] / tau).exp() for j in range(K) for i in range(per_sop)])
    P = torch.zeros(K, dtype=torch.float64)
    for member, share in enumerate(e / e.sum()):
        own, i = divmod(member, per_sop)
        row = torch.full((K,), (1 - float(s[own, i])) / (K - 1), dtype=torch.float64)  # of Y
        row[own] = float(s[own, i])
        P = P + share * row
    return P


# ---- probabilities -----------------------------------------------------------------------------
def test_an_anchor_alone_votes_nine_tenths_for_itself_and_shares_the_rest():
    bank = anchors_alone(torch.eye(4))
    assert bank.members.shape == (4, 1, 4) and bank.s.tolist() == [[pytest.approx(0.9)]] * 4
    Y = bank.log_probabilities(torch.eye(4), 1e-3).exp()  # so sharp that u is one anchor
    assert torch.allclose(Y, torch.full((4, 4), 0.1 / 3).fill_diagonal_(0.9), atol=1e-6)
    u = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()  # its softmax over these anchors, at tau 1
    P = bank.log_probabilities(u, 1.0).exp()
    assert P.tolist() == pytest.approx([0.64, 0.12, 0.12, 0.12])


def test_the_factor_on_logits_is_an_inverse_temperature():
    bank, u = drawn_bank(K=6, D=5, M=20, k=2), unit(7, 5, seed=1)
    expected = bank.log_probabilities(u, 0.1)
    bank.scale = 4.0
    assert torch.allclose(bank.log_probabilities(u, 0.4), expected, atol=1e-5)


def test_all_of_a_memory_can_be_anchors_and_no_vector_is_one_twice():
    bank = drawn_bank(K=6, D=5, M=9, k=0)
    assert bank.members.shape == (6, 1, 5)
    is_anchor = (bank.memory[:, None] == bank.members[None, :, 0]).all(2)  # (M, K)
    assert is_anchor.sum(0).tolist() == [1] * 6 and is_anchor.sum(1).max() == 1


def test_class_tokens_and_patches_have_other_anchors_at_the_same_step():
    args = sop.parse([*TINY, "--memory", "64", "--patch-memory", "64", "--neighbours", "1"])
    of_class, of_patches = Bank.from_args(args), sop.patch_bank(args)
    of_patches.memory.copy_(of_class.memory)
    for step in range(3):
        of_class.draw(step)
        of_patches.draw(step)
        assert not torch.equal(of_class.members[:, -1], of_patches.members[:, -1])


# ---- the loss ----------------------------------------------------------------------------------
@pytest.mark.parametrize("K, floor", [(512, 0.9487), (128, 0.8095), (4, 0.4349)])
def test_the_loss_of_patches_at_agreement_and_where_all_is_uniform(K, floor):
    """weights: of a crop with two hidden patches, and of one with one."""
    bank, loss = anchors_alone(torch.eye(K)), sop.PatchSOP(K, 0.01, 0.01)
    weights, rows = torch.tensor([0.25, 0.25, 0.5]), torch.eye(K)[[0, 2, 1]]
    P_t = loss.targets(rows, bank, 0)
    assert float(loss(rows, P_t, weights, bank)) == pytest.approx(floor, abs=2e-4)
    uniform = float(loss(torch.zeros(3, K), P_t, weights, bank))
    assert uniform == pytest.approx(math.log(K), rel=1e-5) == pytest.approx(loss.uniform)


@pytest.mark.parametrize("crops, n, K, k", [(2, 5, 3, 0), (4, 4, 7, 0), (6, 9, 5, 3)])
def test_the_patch_loss_beside_a_loop_in_float64(crops, n, K, k):
    """Value and gradient; the first crop has nothing hidden. The teacher and memory get none."""
    D, tau, tau_t = 8, 0.1, 0.04
    hidden = torch.rand(crops, n, generator=torch.Generator().manual_seed(3)) < 0.5
    hidden[0] = False
    crop_of, weights = weights_of(hidden)
    bank, loss = drawn_bank(K, D, 40, k), sop.PatchSOP(K, tau, tau_t)
    h_t = unit(len(crop_of), D, seed=4).requires_grad_()
    h_s = unit(len(crop_of), D, seed=5).requires_grad_()
    value = loss(h_s, loss.targets(h_t, bank, 0), weights, bank)
    value.backward()

    members, s = bank.members.double(), bank.s.double()
    h = h_s.detach().double().requires_grad_()
    total = 0
    for crop in range(crops):
        mine = [r for r in range(len(crop_of)) if crop_of[r] == crop]
        for r in mine:
            P_t = probabilities(h_t[r].detach().double(), members, s, tau_t)
            log_P = probabilities(h[r], members, s, tau).log()
            for j in range(K):
                total = total - P_t[j] * log_P[j] / max(len(mine), 1) / crops
    total.backward()
    assert float(value.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert torch.allclose(h_s.grad.double(), h.grad, atol=1e-5)
    assert h_t.grad is None
    assert not bank.memory.requires_grad and not bank.members.requires_grad


def test_rows_without_a_hidden_patch_cost_nothing():
    bank, loss = drawn_bank(5, 8, 40, 0), sop.PatchSOP(5, 0.1, 0.04)
    h_s = torch.zeros(0, 8, requires_grad=True)
    P_t = loss.targets(torch.zeros(0, 8), bank, 0)
    assert P_t.shape == (0, 5)
    value = loss(h_s, P_t, torch.zeros(0), bank)
    value.backward()
    assert float(value.detach()) == 0 and h_s.grad.shape == (0, 8)


# ---- memory ------------------------------------------------------------------------------------
@pytest.fixture
def seen(monkeypatch):
    """A run with the teacher of its start appends (crops, members of the patches) of its steps."""
    steps = []
    original_next, original_step = ibot.Clock.next, Bank.step

    def next_crops(clock, batches):
        steps.append({"crops": original_next(clock, batches)})
        return steps[-1]["crops"]

    def step(bank, *args):
        report = original_step(bank, *args)
        name = "class" if "class" not in steps[-1] else "patch"
        steps[-1][name] = {"members": bank.members, "s": bank.s, "memory": bank.memory.clone()}
        return report
    monkeypatch.setattr(ibot.Clock, "next", next_crops)
    monkeypatch.setattr(Bank, "step", step)
    return steps


STILL = ["--momentum", "1", "--momentum-end", "1"]  # the teacher stays as it was at the start


def networks_of(out, *flags):
    """(args, student, teacher) of a run; no gradient goes into them."""
    args, ckpt = sop.parse([*TINY, *flags]), read_checkpoint(out)
    nets = []
    for name in ("student", "teacher"):
        nets.append(ibot.network(args, student=name == "student"))
        nets[-1].requires_grad_(False).load_state_dict(ckpt[name])
    return args, *nets


@pytest.mark.parametrize("M", [24, 20])
def test_one_patch_of_each_second_crop_enters_the_memory_first_in_first_out(tmp_path, seen, M):
    """Beside a list. In 20 places, the third batch of 8 wraps."""
    flags = [*STILL, "--patch-memory", str(M), "--mask-share", "1"]
    run(tmp_path, *flags)
    args, _, teacher = networks_of(tmp_path, *flags)
    queue = list(sop.patch_bank(args).memory)
    oldest = 0
    for step, found in enumerate(seen):
        assert torch.allclose(found["patch"]["memory"], torch.stack(queue), atol=1e-5)
        patches = teacher.backbone(found["crops"][1])[1]  # (B, n, dim) of clean second crops
        places = ibot.ibot_places(args, step, 64)[1, :, 0]  # (B,)
        new = teacher.head(torch.stack([patches[i, place] for i, place in enumerate(places)]))
        for vector in new:  # in the order of the images, after the step has used the memory
            is_there = (found["patch"]["memory"] @ vector > 1 - 1e-6).any()
            assert not is_there
            queue[oldest] = vector
            oldest = (oldest + 1) % M
    assert len(seen) == 6


def test_the_loss_of_a_step_beside_loops_over_its_patches(tmp_path, seen):
    """Hidden patches of the student beside clean ones of the teacher, of the same crop and place.
    The first step has lr 0, so the networks are those of the checkpoint."""
    run(tmp_path, "--steps", "1", "--log-every", "1")
    args, student, teacher = networks_of(tmp_path)
    crops, bank = seen[0]["crops"], seen[0]["patch"]
    hidden = ibot.hidden_patches(args, 8, 0, 8)  # (2, B, n)
    members, s, total = bank["members"].double(), bank["s"].double(), 0
    for view in range(2):
        clean = teacher.backbone(crops[view])[1]  # (B, n, dim)
        masked = student.backbone(crops[view], mask=hidden[view],
                                  mask_token=student.mask_token)[1]  # (B, n, dim)
        for i in range(8):
            places = hidden[view, i].nonzero().flatten().tolist()
            for place in places:
                h_t, h_s = teacher.head(clean[i, place][None]), student.head(masked[i, place][None])
                P_t = probabilities(h_t[0].double(), members, s, 0.04)
                P_s = probabilities(h_s[0].double(), members, s, 0.1)
                total += float(-(P_t * P_s.log()).sum()) / len(places) / 8 / 2
    assert total > 0.5
    assert float(read_log(tmp_path)[1]["patch"]) == pytest.approx(total, rel=1e-4)


# ---- whole runs --------------------------------------------------------------------------------
KINDS = [[],
         ["--memory", "37", "--neighbours", "3", "--patch-memory", "45", "--patch-neighbours", "2",
          "--patch-rows", "3", "--num-patch-prototypes", "12", "--no-shared-head", "--place-mean"]]
NAMES = ["as published", "all else"]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_run_that_was_stopped_ends_at_the_bits_of_one_that_was_not(tmp_path, capsys, kind):
    flags = [*kind, "--steps", "12", "--eval-every", "12"]
    metrics = run(tmp_path / "whole", *flags)
    for stop in (3, 8):
        run(tmp_path / "parts", *flags, "--stop-at", stop, "--resume")
    run(tmp_path / "parts", *flags, "--resume")
    one, two = (read_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert not differences(one, two)
    log = read_log(tmp_path / "whole")
    assert read_log(tmp_path / "parts") == log
    assert one["prototypes"].keys() == {"memory", "patch_memory", "start", "student", "teacher"}
    assert torch.equal(one["prototypes"]["patch_memory"], one["patch_teacher"]["memory"])
    assert one["patch_teacher"]["coming"].any()
    for name in ("patch_used", "patch_drift", "patch_place_nats"):
        assert float(log[-1][name]) == pytest.approx(metrics[name], rel=1e-4)
    assert metrics["patch_drift"] > 0 and metrics["patch_unique_0.5"] is None
    assert 0 < float(log[1]["patch_over_ln_k"]) < 2

    capsys.readouterr()
    assert collapse.main([str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    for name in ("whole prototypes: memory", "whole patch_prototypes: memory"):
        assert name in printed
    from support import runs
    _, protos, loss, args = runs.load_run(str(tmp_path / "whole"))
    assert torch.equal(protos.vectors(), one["prototypes"]["memory"])
    assert args["script"] == "zoo/sop.py" and type(loss) is sop.SOP


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_four_micro_batches_are_one_batch(tmp_path, kind):
    for accum in ("1", "4"):
        run(tmp_path / accum, *kind, "--accum", accum, "--log-every", "1", "--lr", "1e-4")
    for row_1, row_4 in zip(*(read_log(tmp_path / accum)[1:] for accum in "14"), strict=True):
        for term in ("cross_entropy", "patch"):
            assert float(row_1[term]) == pytest.approx(float(row_4[term]), rel=1e-4, abs=1e-6)
    one, four = (read_checkpoint(tmp_path / accum)["prototypes"] for accum in "14")
    for name in ("memory", "patch_memory"):
        assert torch.allclose(one[name], four[name], atol=1e-4)


def test_two_processes_equal_one_and_fill_their_memories_in_its_order(tmp_path):
    compare_one_process_with_two("sop", KINDS, [*TINY, "--lr", "1e-3"], ("cross_entropy", "patch"),
                                 tmp_path)


def test_a_run_in_which_nothing_is_hidden_fills_its_memory_all_the_same(tmp_path):
    run(tmp_path, "--mask-share", "0", "--patch-weight", "0")
    log = read_log(tmp_path)
    assert [float(row["patch"]) for row in log[1:]] == [0, 0, 0]
    assert float(log[-1]["skipped"]) == 0 and "patch_over_ln_k" not in log[-1]
    ckpt = read_checkpoint(tmp_path)
    start, memory = ckpt["patch_teacher"]["start"], ckpt["patch_teacher"]["memory"]
    changed = (start != memory).any(1).tolist()
    assert changed == [True] * 40 + [False] * 24  # 5 batches of 8: those of step 6 are to come


def test_without_patches_the_class_stream_is_that_of_train_py(tmp_path):
    """On the same network train.py --method sop prints the same losses."""
    import train
    same = ["--method", "sop", "--prototypes", "bank", "--arch", "vit_micro", "--patch-size", "4",
            "--no-head-bn", "--momentum", "0.99", "--log-every", "1"]
    train.main([*TINY, "--out", str(tmp_path / "train"), *same])
    run(tmp_path / "sop", *same, "--mask-share", "0", "--patch-weight", "0")
    rows = [read_log(tmp_path / name)[1:] for name in ("train", "sop")]
    for row, other in zip(*rows, strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
    one, two = (read_checkpoint(tmp_path / name)["prototypes"]["memory"]
                for name in ("train", "sop"))
    assert torch.allclose(one, two, atol=1e-4)


def test_the_monitor_knows_that_shares_are_of_the_memory_and_not_of_the_anchors(tmp_path,
                                                                                monkeypatch):
    """Else it takes 61 vectors in use among 512 for 2 of 16, and warns of a collapse."""
    import train
    sizes, Monitor = [], ibot.Monitor
    for script in (train, ibot):
        monkeypatch.setattr(script, "Monitor", lambda K, name: sizes.append(K) or Monitor(K))
    run(tmp_path / "sop", "--stop-at", "1")
    train.main([*TINY, "--out", str(tmp_path / "train"), "--stop-at", "1", "--method", "sop",
                "--prototypes", "bank", "--memory", "100"])
    train.main([*TINY, "--out", str(tmp_path / "joint"), "--stop-at", "1", "--prototypes", "joint"])
    assert sizes == [512, 100, 16]


@pytest.mark.parametrize("flags, sentence", [
    (["--patch-memory", "15"],
     "--patch-memory 15 is too small for --num-patch-prototypes 16 anchors and --patch-neighbours "
     "0 others"),
    (["--num-patch-prototypes", "1"], "--num-patch-prototypes must be at least 2, got 1"),
    (["--memory", "20"], "--memory 20 is too small for --num-prototypes 16 anchors"),
    (["--patch-neighbours", "-1"], "--patch-neighbours must not be negative, got -1"),
    (["--patch-memory", "0"], "--patch-memory must be at least 1, got 0"),
    (["--patch-rows", "0"], "--patch-rows must be at least 1, got 0"),
    (["--head-bn", "--no-shared-head"], "--head-bn with --no-shared-head"),
    (["--targets", "sinkhorn"], "--targets changes nothing with --method sop"),
    (["--teacher-temp-epochs", "2"], "--teacher-temp-epochs changes nothing with --method sop"),
    (["--teacher-temp", "0.04", "0.07"], "--teacher-temp 0.04 0.07: START counts only with"),
    (["--student-prototypes", "joint"], "argument --student-prototypes: invalid choice"),
    (["--arch", "vit_nano", "--patch-size", "8"], "see 39 of the 64 pixels of a hidden patch"),
    (["--prototypes", "joint"], "--prototypes"), (["--method", "dino"], "--method")])
def test_bad_flags_are_one_sentence(tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as refusal:
        run(tmp_path / "run", *flags)
    assert refusal.value.code == 2
    assert sentence in capsys.readouterr().err


def test_ibot_names_the_script_for_a_bank_of_patches(tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        ibot.main([*TINY, "--out", str(tmp_path / "run"), "--patch-prototypes", "bank"])
    assert refusal.value.code == 2
    assert "--patch-prototypes bank belongs to python -m zoo.sop" in capsys.readouterr().err


def test_the_preset_holds_the_numbers_of_the_paper_and_the_defaults_its_ratios():
    args = sop.parse(["--preset", "paper-sop-vits", "--device", "cpu", "--data", "shapes"])
    assert (args.num_prototypes, args.neighbours, args.memory) == (4096, 8, 65536)
    assert (args.num_patch_prototypes, args.patch_neighbours, args.patch_memory) == (512, 0, 8192)
    assert args.teacher_temp == [0.04, 0.04] and args.student_temp == 0.1
    assert np.isclose(args.momentum, 0.996) and args.momentum_end == 1
    assert args.shared_head and args.head_norm and not args.head_bn and args.patch_rows == 1
    assert args.mask_ratio == [0.1, 0.5] and args.mask_share == 0.5 and args.patch_weight == 1
    args = sop.parse(["--device", "cpu"])
    assert (args.num_prototypes, args.num_patch_prototypes, args.batch_size) == (128, 128, 32)
    assert len(Bank.from_args(args).memory) == 64 * 32
    assert len(sop.patch_bank(args).memory) == 8 * 32


def test_the_flags_of_temperatures_and_scale_reach_both_streams():
    args = sop.parse([*TINY, "--out", "nowhere", "--logit-scale", "3", "--student-temp", "0.2",
                      "--teacher-temp", "0.05", "0.05"])
    for stream in sop.streams(args, 1, 0, torch.device("cpu")):
        assert stream.student.scale == 3
        assert (stream.loss.tau, stream.loss.tau_t) == (0.2, 0.05)
