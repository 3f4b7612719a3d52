"""Backbones in and out: --export and --init, beside timm's transformers and what people release.

With the sizes of models.py, unlike the other tests of runs.
"""
import functools
import re

import pytest
import torch

import models
import train
from conftest import differences, read_checkpoint, sentence_of_refusal, train_tiny
from support import checkpoints, export
from support.backbones import load_backbone

pytestmark = pytest.mark.usefixtures("small_shapes")
VIT = ["--arch", "vit_micro", "--patch-size", "8", "--steps", "1", "--gmm-start", "0"]
NANO = dict(patch_size=8, img_size=32)
IN_TIMM = dict(img_size=32, patch_size=8, embed_dim=96, depth=3, num_heads=3, num_classes=0)


def backbone_of(ckpt, network):
    return {name.removeprefix("backbone."): value for name, value in ckpt[network].items()
            if name.startswith("backbone.")}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_goes_into_timm_and_back(tmp_path, capsys, suffix):
    timm = pytest.importorskip("timm")
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    train_tiny(tmp_path / "a", *VIT)
    file = tmp_path / f"backbone{suffix}"
    train.main(["--export", str(file), "--out", str(tmp_path / "a")])
    theirs = timm.models.vision_transformer.VisionTransformer(**IN_TIMM)
    theirs.load_state_dict(checkpoints.read(file), strict=True)
    ours = models.build("vit_micro", **NANO)
    export.init(file, [ours])
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(x), ours.eval()(x)[0], atol=1e-5)
    teacher = backbone_of(read_checkpoint(tmp_path / "a"), "teacher")
    assert not differences(teacher, ours.state_dict())
    assert "only copy, all 42 tensors; not used: none" in capsys.readouterr().out

    train_tiny(tmp_path / "b", *VIT, "--init", file)  # its only step has learning rate 0
    assert "all 42 tensors; not used: none" in capsys.readouterr().out
    ckpt = read_checkpoint(tmp_path / "b")
    for network in ("student", "teacher"):
        assert not differences(teacher, backbone_of(ckpt, network))
    with pytest.raises(SystemExit):
        train.main(["--export", str(file), "--out", str(tmp_path / "a")])
    assert "exists already" in capsys.readouterr().err


@functools.lru_cache
def nano_weights():
    return models.build("vit_nano", **NANO).state_dict()


def dino_release():
    """The layout of DINO's full checkpoints; the teacher's weights are those of nano plus 1."""
    release = {}
    for more, network in enumerate(("student", "teacher")):
        release[network] = {f"module.backbone.{name}": value + more
                            for name, value in nano_weights().items()}
        release[network]["module.head.mlp.0.weight"] = torch.zeros(3)
    return release


def timm_file():
    return {**nano_weights(), "head.weight": torch.zeros(10, 96), "head.bias": torch.zeros(10)}


def file_of_a_run():
    teacher = {f"backbone.{name}": value for name, value in nano_weights().items()}
    return {"version": 2, "teacher": teacher}


@pytest.mark.parametrize("stored, added, words", [
    (dino_release, 1, "teacher, all 46 tensors; not used: head.mlp.0.weight"),
    (timm_file, 0, "only copy, all 46 tensors; not used: head.weight, head.bias"),
    (file_of_a_run, 0, "teacher, all 46 tensors; not used: none")])
def test_init_reads_what_people_release(tmp_path, capsys, stored, added, words):
    torch.save(stored(), tmp_path / "x.pth")
    net = models.build("vit_nano", **NANO)
    export.init(tmp_path / "x.pth", [net])
    expected = {name: value + added for name, value in nano_weights().items()}
    assert not differences(expected, net.state_dict())
    assert words in capsys.readouterr().out


def test_init_interpolates_a_position_embedding_of_another_grid(tmp_path, capsys):
    other = models.build("vit_nano", patch_size=8, img_size=64).state_dict()
    torch.save(other, tmp_path / "x.pth")
    net = models.build("vit_nano", **NANO)
    export.init(tmp_path / "x.pth", [net])
    assert "positions interpolated from 8 x 8 to 4 x 4 patches" in capsys.readouterr().out
    ours, theirs = net.state_dict()["pos_embed"], other["pos_embed"]  # (1, 17, 96) (1, 65, 96)
    assert torch.equal(ours[:, 0], theirs[:, 0])
    assert (ours[0, 1:].mean(0) - theirs[0, 1:].mean(0)).abs().max() < 0.02


def refused_by_init_as_by_arch(path, arch, net):
    """The sentence with which --init and --arch refuse a file; `net` stays as it was."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError) as init:
        export.init(path, [net])
    with pytest.raises(ValueError) as evaluation:
        load_backbone(path, arch=arch)
    assert str(init.value) == str(evaluation.value) and "\n" not in str(init.value)
    assert not differences(before, net.state_dict())
    return str(init.value)


@pytest.mark.parametrize("added, removed, says", [
    ({"blocks.0.ls1.gamma": torch.ones(96)}, None, "blocks.0.ls1.gamma too many"),
    ({"blocks.0.attn.q_norm.weight": torch.ones(32)}, None, "blocks.0.attn.q_norm.weight too many"),
    ({"blocks.3.norm1.weight": torch.ones(96)}, None, "blocks.3.norm1.weight too many"),
    ({"patch_embed.norm.weight": torch.ones(96)}, None, "patch_embed.norm.weight too many"),
    ({"register_tokens": torch.ones(1, 4, 96)}, None, "register_tokens too many"),
    ({"reg_token": torch.ones(1, 4, 96)}, None, "reg_token too many"),
    ({"dist_token": torch.ones(1, 1, 96)}, None, "dist_token too many"),
    ({"norm_pre.weight": torch.ones(96)}, None, "norm_pre.weight too many"),
    ({"fc_norm.weight": torch.ones(96)}, None, "fc_norm.weight too many"),
    ({"rel_pos_bias.relative_position_bias_table": torch.ones(9, 3)}, None, "rel_pos_bias"),
    ({"rope_embed.periods": torch.ones(8)}, None, "rope_embed.periods too many"),
    ({"norm.weight": torch.ones(7)}, "norm.bias",
     r"no norm.bias, norm.weight \(7,\) for \(96,\)"),
    ({"norm.weight": torch.ones(96, dtype=torch.int8)}, None, "norm.weight of torch.int8"),
    ({}, "blocks.0.attn.qkv.bias", "no blocks.0.attn.qkv.bias"),
    ({}, "blocks.2", "no blocks.2.norm1.weight.* and 9 more"),
    ({"pos_embed": torch.zeros(1, 16, 96)}, "cls_token", r"no cls_token, pos_embed \(1, 16, 96\)"),
    ({"pos_embed": torch.zeros(1, 17, 95)}, None, r"pos_embed \(1, 17, 95\) for \(1, 17, 96\)"),
    ({"patch_embed.proj.weight": torch.zeros(96, 3, 8, 8)}, "patch_embed.proj.0",
     "no patch_embed.proj.0.weight.*patch_embed.proj.weight too many")])
def test_init_refuses_what_computes_something_else(tmp_path, added, removed, says):
    kept = {name: value for name, value in nano_weights().items()
            if removed is None or not f"{name}.".startswith(f"{removed}.")}
    torch.save({**kept, **added}, tmp_path / "x.pth")
    sentence = refused_by_init_as_by_arch(tmp_path / "x.pth", "vit_nano",
                                          models.build("vit_nano", **NANO))
    assert re.search(f"x.pth does not fit --arch vit_nano: .*{says}", sentence)


@pytest.mark.parametrize("settings, says", [
    (dict(init_values=1e-5), "blocks.0.ls1.gamma too many"),
    (dict(reg_tokens=4), "reg_token too many"),
    (dict(qk_norm=True), "blocks.0.attn.q_norm.weight too many"),
    (dict(qkv_bias=False), "no blocks.0.attn.qkv.bias"),
    (dict(class_token=False, global_pool="avg"), "no cls_token"),
    (dict(global_pool="avg"), "no norm.weight, .*fc_norm.weight too many"),
    (dict(pre_norm=True), "no patch_embed.proj.bias, norm_pre.weight too many"),
    (dict(depth=2), "no blocks.2.norm1.weight"),
    (dict(depth=4), "blocks.3.norm1.weight too many"),
    (dict(patch_size=16), r"patch_embed.proj.weight \(96, 3, 16, 16\) for \(96, 3, 8, 8\)"),
    (dict(in_chans=1), r"patch_embed.proj.weight \(96, 1, 8, 8\) for \(96, 3, 8, 8\)"),
    (dict(img_size=(32, 64)), r"pos_embed \(1, 33, 96\) for \(1, 17, 96\)"),
    (dict(mlp_ratio=2), r"blocks.0.mlp.fc1.bias \(192,\) for \(384,\)"),
    (dict(embed_dim=48), r"pos_embed \(1, 17, 48\) for \(1, 17, 96\)")])
def test_init_refuses_timms_other_transformers(tmp_path, settings, says):
    timm = pytest.importorskip("timm")
    other = timm.models.vision_transformer.VisionTransformer(**{**IN_TIMM, **settings})
    torch.save(other.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"x.pth does not fit --arch vit_micro: .*{says}"):
        export.init(tmp_path / "x.pth", [models.build("vit_micro", **NANO)])


def test_init_refuses_another_stem_of_a_resnet(tmp_path):
    torch.save(models.build("resnet18").state_dict(), tmp_path / "x.pth")
    small = models.build("resnet18", in_small=True)
    with pytest.raises(ValueError, match=r"fit --arch resnet18: conv1.weight \(64, 3, 7, 7\) for"):
        export.init(tmp_path / "x.pth", [small])


def test_init_refuses_files_without_such_a_network(tmp_path, capsys):
    torch.save({"a": torch.zeros(3)}, tmp_path / "y.pth")
    sentence = sentence_of_refusal(capsys, tmp_path / "out", "--init", tmp_path / "y.pth")
    assert "y.pth holds no teacher that fits --arch vit_nano; its keys: a" in sentence
    torch.save({**nano_weights(), "norm.weight": torch.ones(96).to("meta")}, tmp_path / "y.pth")
    sentence = sentence_of_refusal(capsys, tmp_path / "out", "--init", tmp_path / "y.pth")
    assert "y.pth: norm.weight is without values (meta)" in sentence
    sentence = sentence_of_refusal(capsys, tmp_path / "out", "--init", tmp_path / "z.pth")
    assert "no such file" in sentence


def test_export_of_a_run_that_is_not_there_says_so(tmp_path, capsys):
    assert (f"--export writes the backbone of a run that is there, and --out {tmp_path / 'new'} "
            "holds none: train it first, without --export") in sentence_of_refusal(
                capsys, tmp_path / "new", "--export", str(tmp_path / "b.pt"))


@pytest.mark.parametrize("copy", ["momentum_encoder", "base_encoder"])
def test_the_small_transformer_of_moco_v3_has_other_heads(tmp_path, copy):
    """Its tensors have the shapes of ours, and 12 heads where ours has 6."""
    net = models.build("vit_small", patch_size=16, img_size=32)
    torch.save({"state_dict": {f"module.{copy}.{name}": value
                               for name, value in net.state_dict().items()}}, tmp_path / "f.pth")
    with pytest.raises(ValueError, match="has the names of MoCo v3, whose ViT-S has 12 heads"):
        load_backbone(tmp_path / "f.pth", "teacher", arch="vit_small")
    with pytest.raises(ValueError, match="has the names of MoCo v3, whose ViT-S has 12 heads"):
        export.init(tmp_path / "f.pth", [net])
