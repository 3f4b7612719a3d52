"""One-line changes of the code that no other test noticed: each test here fails on one of them.

Of zoo/sop.py, bank, clustered, swav and uniformity, support/measures.py, monitor and optim.
"""
import argparse
import math

import pytest
import torch
from torch.nn import functional as F

import collapse
import config
import heads
import losses
from conftest import TINY, train_tiny
from support import assign, measures, optim
from support.monitor import Monitor
from zoo import sop
from zoo.bank import Bank
from zoo.clustered import Clustered

pytestmark = pytest.mark.usefixtures("small_shapes")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_flags_of_temperatures_and_scale_reach_both_streams():
    args = sop.parse([*TINY, "--out", "nowhere", "--logit-scale", "3", "--student-temp", "0.2",
                      "--teacher-temp", "0.05", "0.05"])
    for stream in sop.streams(args, 1, 0, torch.device("cpu")):
        assert stream.student.scale == 3
        assert (stream.loss.tau, stream.loss.tau_t) == (0.2, 0.05)


def test_a_neighbour_that_points_away_has_similarity_0():
    """Two vectors in one direction and two against it, of which two are anchors."""
    for step in range(4):
        bank = Bank(2, 2, M=4, k=2, B=1)
        bank.memory.copy_(torch.tensor([[1., 0.], [1., 0.], [-1., 0.], [-1., 0.]]))
        bank.draw(step)
        assert bank.s.min() == 0 and bank.s.max() <= 1


def test_vectors_that_are_not_finite_do_not_enter_the_bank():
    bank = Bank(2, 3, M=8, k=1, B=4)
    h = randn(8, 3)
    h[5] = math.nan  # of the second crop
    bank.step(h, 0)
    bank.step(randn(8, 3, seed=1), 1)
    assert bank.memory.isfinite().all()
    assert torch.equal(bank.memory[:3], F.normalize(h[[4, 6, 7]], dim=1)) and int(bank.place) == 3


def test_clustered_learns_from_half_of_the_peak_rate_on_and_as_long_as_the_run():
    args = config.parse([*TINY, "--prototypes", "clustered", "--lr", "3.2"])
    args.data_seen = {"steps": 40}
    protos = Clustered.from_args(args)
    assert protos.learning_rate(0) == pytest.approx(3.2 * 8 / 256 / 2)
    assert protos.learning_rate(40) == pytest.approx(0.05 * (1 + math.cos(0.8 * math.pi)) / 2)


def test_the_scale_of_logits_is_one_of_clustered_too():
    one, two = (Clustered(5, 4, scale, lr=0.1, total=10) for scale in (1.0, 2.0))
    h = randn(3, 4)
    assert torch.allclose(two.logits(h), 2 * one.logits(h))


def test_the_entropy_of_assignments(monkeypatch):
    """One image is of two prototypes and one of all four: ln 2 and ln 4."""
    P, h = torch.tensor([[.5, .5, 0, 0], [.25, .25, .25, .25]]), torch.eye(2, 3)
    images = argparse.Namespace(y=None)
    run = (None, argparse.Namespace(vectors=lambda: torch.eye(4, 3)), None, {})
    monkeypatch.setattr(assign.checkpoint, "load_run", lambda path: run)
    monkeypatch.setattr(assign.checkpoint, "assignments",
                        lambda run, images: iter([(h[:1], P[:1]), (h[1:], P[1:])]))
    monkeypatch.setattr(assign, "load_images", lambda data, args: (images, None, None))
    found = assign.summary(assign.assign_images("run", "toy", collapse.usage))
    assert found["entropy"] == pytest.approx(1.5 * math.log(2))
    assert found["entropy_over_ln_k"] == pytest.approx(0.75)


def test_a_montage_shows_the_images_nearest_in_cosine_and_no_prototype_twice():
    """The long vector has the larger product with the prototype, and the short one the cosine."""
    x = torch.arange(3)[:, None, None, None].expand(3, 3, 2, 2)
    assigned = argparse.Namespace(h=torch.tensor([[9., 9.], [.1, 0.], [0., 5.]]), C=torch.eye(2),
                                  won=torch.tensor([0, 0, 1]), images=argparse.Namespace(x=x))
    rows = assign.montage_rows(assigned, [], 0, rows=4, n=3)
    assert [title for title, _ in rows] == ["most used\n0 (2 images)", "most used\n1 (1 images)"]
    assert [int(picture[0, 0, 0]) for picture in rows[0][1]] == [1, 0, 2]


def test_k_means_starts_from_other_images_in_each_pass(monkeypatch):
    from zoo import kmeans
    protos, starts = kmeans.KMeans(4, 3, seed=5, n=24, batch_size=8), []
    protos.memory.copy_(F.normalize(randn(24, 3), dim=1))
    monkeypatch.setattr(kmeans, "spherical_kmeans", lambda u, C: (
        starts.append(C), (C, kmeans.assign(u, C)))[1])
    for step in (3, 6):
        protos.cluster(step)
    assert not torch.equal(*starts)
    for C in starts:
        assert len({int((protos.memory == c).all(1).nonzero()) for c in C}) == 4


# ---- swav, uniformity: test_zoo.py
@pytest.mark.parametrize("K, typed, Q", [(16, [], 15 * 8), (8, [], 0), (16, ["--queue", "3"], 3),
                                         (16, ["--queue", "0"], 0)])
def test_the_queue_of_swav_is_15_batches_where_a_batch_is_smaller_than_K(K, typed, Q):
    args = config.parse([*TINY, "--method", "swav", "--prototypes", "joint", "--num-prototypes",
                         str(K), *typed])
    assert losses.loss(args).queue.shape == (2, Q, 8)


def test_the_flag_is_the_weight_of_uniformity():
    args = config.parse([*TINY, "--method", "carp-uniform", "--uniformity", "0.3"])
    loss = losses.loss(args)
    assert (loss.weight, loss.partition_size) == (0.3, 8)


# ---- measures
def test_measures_of_a_set_beside_plain_numbers():
    """Vectors far from 0, of which a set with an origin sees what is left beside it."""
    N, K, D, tau = 150, 6, 3, 0.5
    protos, h = heads.Frozen(K, D, scale=2.0, seed=1), 8 + randn(N, D)
    protos.origin = torch.full((D,), 8.)
    loss = losses.DINOLoss(K, 10, temps=(tau, tau))
    loss.centre += torch.linspace(-2, 2, K)
    found = measures.prototype_measures(protos, loss, h, 0.5, seed=3)

    z = 2 * (h.double() - 8) @ protos.start.double().T  # (N, K)
    P = ((z - loss.centre.double()) / tau).softmax(1)
    mean = P.mean(0)
    assert found["used"] == len(P.argmax(1).unique()) / K
    assert found["perplexity"] == pytest.approx(float((-(mean * mean.log()).sum()).exp()) / K)
    lengths = sorted(float(x.norm()) for x in h)
    assert lengths[74] <= found["h_norm"] <= lengths[75]
    cosines = [float(F.cosine_similarity(h[i].double(), h[j].double(), dim=0))
               for i in range(N) for j in range(i)]
    assert found["h_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert found["z_sd"] == pytest.approx(sum(float(row.std()) for row in z) / N, rel=1e-5)
    assert found["drift"] == 0
    for eps in (0.025, 0.5):
        assert found[f"unique_{eps}"] == len(collapse.unique_prototypes(protos.start, eps)) / K
        assert found[f"ceiling_{eps}"] == collapse.ceiling(h - 8, K, eps, 3)
    assert collapse.ceiling(h, K, 0.5, 3) < found["ceiling_0.5"]


def test_shuffled_places_tell_little_of_prototypes_that_are_places():
    protos, places = heads.Frozen(4, 4), torch.arange(400) % 4
    protos.start.copy_(torch.eye(4))
    found = measures.place_measures(protos, losses.CARPLoss(4, 4), torch.eye(4)[places], places,
                                    0.5, 0)
    assert found["place_nats"] == pytest.approx(math.log(4))
    assert found["place_nats_shuffled"] < 0.1


class Teacher(torch.nn.Module):
    """Counts its calls in a buffer, as batch norm does."""
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, crops):
        self.calls += 1
        return torch.cat([crop.mean((2, 3)) for crop in crops])


def test_an_evaluation_meets_the_global_crops_of_the_steps_to_come():
    """60 crops at most, of 2 crops of 8 images a step: 3 steps. Buffers are as they were."""
    import contextlib
    from dataclasses import replace

    import views
    from conftest import small_sets
    images, args, teacher = small_sets()[0], config.parse(TINY), Teacher()
    recipe = config.recipe(args)
    h = measures.coming_vectors(teacher, images, recipe, 4, args, "cpu", contextlib.nullcontext())
    expected = [Teacher()(crops) for crops in views.batches(
        images, replace(recipe, n_local=0), batch_size=8, seed=0, start=4, stop=7)]
    assert torch.equal(h, torch.cat(expected)) and h.shape == (48, 3)
    assert teacher.calls == 0


def test_the_controls_beside_the_last_evaluation_are_those_of_row_0(tmp_path, monkeypatch):
    answers = iter([11.0, 22.0, 33.0])  # untrained, raw pixels, trained
    monkeypatch.setattr(measures, "knn", lambda *args: next(answers))
    metrics = train_tiny(tmp_path)
    assert (metrics["untrained_knn"], metrics["raw_knn"], metrics["knn"]) == (11, 22, 33)


def test_raw_pixels_are_all_of_32_and_means_of_larger_images():
    import views
    from conftest import small_sets
    images = small_sets()[1]
    x = torch.cat(list(views.eval_batches(images, 32)))
    assert torch.equal(measures.pixels(images, 32), x.flatten(1))
    x = torch.cat(list(views.eval_batches(images, 64)))
    means = x.view(50, 3, 32, 2, 32, 2).mean((3, 5))
    assert torch.allclose(measures.pixels(images, 64), means.flatten(1), atol=1e-5)


HEALTHY = {"loss_over_ln_k": 0.7, "progress": 0.9, "perplexity": 0.5, "unique_0.025": 1.0,
           "unique_0.5": 0.9, "ceiling_0.5": 0.01, "used": 0.4, "h_norm": 12.0,
           "mixture_used": None}


@pytest.mark.parametrize("change, K, named", [
    ({"loss_over_ln_k": 1.0, "progress": 0.19}, 1024, 0),
    ({"loss_over_ln_k": 1.0, "progress": 0.21}, 1024, 1),
    ({"perplexity": 1.5 / 8}, 8, 0), ({"perplexity": 1.5 / 9}, 9, 1)])
def test_where_a_warning_begins(change, K, named):
    assert len(Monitor(K).warnings(HEALTHY | change)) == named


SGD = config.parse(["--optimizer", "sgd", "--device", "cpu"])


def test_sgd_by_hand():
    w = torch.tensor([[1.0]], requires_grad=True)
    take_step = optim.CheckedStep(optim.make(SGD, [w]), [])
    for step in range(2):
        w.grad = torch.tensor([[0.5]])
        take_step(torch.tensor([1.0]), step, lr=0.1, weight_decay=0.0)
    assert float(w.detach()) == pytest.approx(1 - 0.1 * 0.5 - 0.1 * (0.9 * 0.5 + 0.5))


def test_a_step_is_taken_along_the_clipped_gradient():
    w = torch.tensor([[3.0, 4.0]], requires_grad=True)
    take_step = optim.CheckedStep(optim.make(SGD, [w]), [], clip_grad=0.5)
    w.grad = torch.tensor([[3.0, 4.0]])
    values, _ = take_step(torch.tensor([1.0]), 0, lr=1.0, weight_decay=0.0)
    assert torch.allclose(w.detach(), torch.tensor([[2.7, 3.6]]), atol=1e-5)
    assert float(values[-1]) == pytest.approx(5)  # before the clipping
