"""support/measures.py beside plain numbers."""
import contextlib
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import collapse
import config
import heads
import losses
import views
from conftest import TINY, small_sets, train_tiny
from support import measures
from zoo import masks

pytestmark = pytest.mark.usefixtures("small_shapes")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
    found = masks.place_measures(protos, losses.CARPLoss(4, 4), torch.eye(4)[places], places,
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
    images, args, teacher = small_sets()[0], config.parse(TINY), Teacher()
    recipe = config.recipe(args)
    h = measures.coming_vectors(teacher, images, recipe, 4, args, "cpu", contextlib.nullcontext())
    expected = [Teacher()(crops) for crops in views.batches(
        images, replace(recipe, n_local=0), batch_size=8, seed=0, start=4, stop=7)]
    assert torch.equal(h, torch.cat(expected)) and h.shape == (48, 3)
    assert teacher.calls == 0


def test_the_teacher_meets_two_crops_also_where_a_fork_adds_views(monkeypatch):
    images, args = small_sets()[0], config.parse(TINY)
    recipe, autocast = config.recipe(args), contextlib.nullcontext()
    before = measures.coming_vectors(Teacher(), images, recipe, 4, args, "cpu", autocast)
    whole = views.Recipe.views
    monkeypatch.setattr(views.Recipe, "views", lambda self: [
        *whole(self), views.View(24, (0.2, 0.6), 0.0, 0.0)])
    after = measures.coming_vectors(Teacher(), images, recipe, 4, args, "cpu", autocast)
    assert len(after) == 32 and torch.equal(after, before[:32])  # of two steps, not of three


def test_the_set_of_a_student_is_measured_by_the_softmax_of_the_loss():
    """Without the centre, which is of the teacher's logits, and at the student's temperature."""
    protos, h = heads.Frozen(6, 3, scale=2.0, seed=1), randn(150, 3)
    loss = losses.DINOLoss(6, 10, temps=(0.5, 0.5), tau=0.1)
    loss.centre += torch.linspace(-2, 2, 6)
    found = measures.student_measures(protos, loss, h, 0.5, seed=3)
    P = (2 * h.double() @ protos.start.double().T / 0.1).softmax(1)  # (N, K)
    mean = P.mean(0)
    assert found["student_used"] == len(P.argmax(1).unique()) / 6
    assert found["student_perplexity"] == pytest.approx(
        float((-(mean * mean.log()).sum()).exp()) / 6)


def test_the_controls_beside_the_last_evaluation_are_those_of_row_0(tmp_path, monkeypatch):
    answers = iter([11.0, 22.0, 33.0])  # untrained, raw pixels, trained
    monkeypatch.setattr(measures, "knn", lambda *args: next(answers))
    metrics = train_tiny(tmp_path)
    assert (metrics["untrained_knn"], metrics["raw_knn"], metrics["knn"]) == (11, 22, 33)


def test_raw_pixels_are_all_of_32_and_means_of_larger_images():
    images = small_sets()[1]
    x = torch.cat(list(views.eval_batches(images, 32)))
    assert torch.equal(measures.pixels(images, 32), x.flatten(1))
    x = torch.cat(list(views.eval_batches(images, 64)))
    means = x.view(50, 3, 32, 2, 32, 2).mean((3, 5))
    assert torch.allclose(measures.pixels(images, 64), means.flatten(1), atol=1e-5)
