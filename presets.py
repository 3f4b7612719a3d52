"""Presets: values for many flags at once, the recipes of the papers among them.

A preset holds what its recipe names; all else has the default of config.py, and a flag that is
typed wins over both. Where a recipe is a row of a table, the comment names it.
"""
# python train.py: 1.5 to 4 minutes on 2 CPU cores; docs and README show its numbers
PRESETS = {"tiny": {}}

# python train.py --preset cifar10: for one GPU; not run
PRESETS["cifar10"] = dict(
    data="cifar10", arch="vit_tiny", patch_size=4, drop_path=0.1,
    num_prototypes=4096, partition_size=512, head_hidden=1024, bottleneck_dim=256,
    batch_size=256, epochs=200, warmup_epochs=10, lr=1e-3, momentum=0.992,
    local_crops=6, global_scale=[0.32, 1.0], local_scale=[0.1, 0.32],
    jitter=[0.4, 0.4, 0.2, 0.1], gray=0.2, solarize=[0.0, 0.2, 0.0],
    log_every=100, eval_every=1950)

# python train.py --preset cifar10-cpu: the tiny network on real images; docs/results.md
# has its numbers
PRESETS["cifar10-cpu"] = dict(
    data="cifar10", epochs=8.0, batch_size=32, lr=0.012,
    jitter=[0.4, 0.4, 0.2, 0.1], gray=0.2, log_every=100, eval_every=1562)

# The rows of the papers, for 8 GPUs. None of them was run.
#   torchrun --nproc_per_node=8 train.py --preset NAME --data IMAGENET
# Table B.1a: CARP + Decoupling, ViT-S; CARP itself: --prototypes joint. 300 epochs and 10 local
# crops: Sec. 4.4; partitions, jitter and blur: CARP's code
PRESETS["paper-vits"] = dict(
    data="imagenet", arch="vit_small", patch_size=16, img_size=224, drop_path=0.1,
    local_size=96, local_crops=10, global_scale=[0.32, 1.0], local_scale=[0.05, 0.32],
    jitter=[0.4, 0.4, 0.2, 0.1], blur=[1.0, 0.1, 0.5], gray=0.2, solarize=[0.0, 0.2, 0.0],
    head_hidden=2048, bottleneck_dim=256, head_bn=False,
    num_prototypes=65536, partition_size=512,
    batch_size=1024, epochs=300, warmup_epochs=10, lr=5e-4, min_lr=1e-6,
    weight_decay=0.04, weight_decay_end=0.4, momentum=0.992, clip_grad=1.0,
    workers=10, log_every=100, eval_every=12510, eval_bank=50000, eval_queries=10000)

# Table B.1b: CARP + Decoupling, ViT-B; CARP itself: --prototypes joint
PRESETS["paper-vitb"] = dict(
    PRESETS["paper-vits"], arch="vit_base", epochs=400, lr=7.5e-4, min_lr=2e-6, momentum=0.996,
    clip_grad=0.3)

# Table 2: iNaturalist-2018; with --data-root DIR instead of --data
PRESETS["inat18"] = dict(PRESETS["paper-vits"], data="inat18")

# DINO's official recipe, as run for Table C.3
PRESETS["paper-dino"] = dict(
    PRESETS["paper-vits"], method="dino", prototypes="joint", epochs=100, momentum=0.996,
    clip_grad=3.0, local_crops=6, global_scale=[0.4, 1.0], local_scale=[0.05, 0.4],
    teacher_temp=[0.04, 0.07], teacher_temp_epochs=30, freeze_prototypes=1)

# Last row of Table C.3: DINO with decoupled prototypes
PRESETS["paper-dino-dec"] = dict(
    PRESETS["paper-dino"], prototypes="decoupled", targets="sinkhorn",
    teacher_temp=[0.05, 0.025], teacher_temp_epochs=100, num_prototypes=2048)

# CARP's official ResNet-50, here with decoupled prototypes; CARP itself: --prototypes joint. Its
# batch size is not published; 1,024 is ours
PRESETS["paper-rn50"] = dict(
    PRESETS["paper-vits"], arch="resnet50", drop_path=0.0, head_bn=True,
    optimizer="lars", lr=0.45, min_lr=0.0048, warmup_epochs=0, epochs=400,
    weight_decay=1e-6, weight_decay_end=1e-6, momentum=0.99, clip_grad=0.0,
    local_crops=6, global_scale=[0.2, 1.0], local_scale=[0.05, 0.2])

# Fig. 4a: CARL with CARP's recipe, 100 epochs
PRESETS["paper-carl"] = dict(
    PRESETS["paper-rn50"], method="carl", prototypes="joint", epochs=100)

# DINO's official ResNet-50, 100 epochs
PRESETS["paper-dino-rn50"] = dict(
    PRESETS["paper-dino"], arch="resnet50", drop_path=0.0, optimizer="sgd", lr=0.03,
    weight_decay=1e-4, weight_decay_end=1e-4, local_crops=8, global_scale=[0.14, 1.0],
    local_scale=[0.05, 0.14], teacher_temp=[0.04, 0.04], teacher_temp_epochs=0)

# Rows of Tables 3 and C.1: SwAV's official recipe; DeepCluster-v2 shares it, and trains longer
PRESETS["paper-swav"] = dict(
    data="imagenet", method="swav", prototypes="joint", arch="resnet50", patch_size=16,
    img_size=224, local_size=96, local_crops=6, global_scale=[0.14, 1.0], local_scale=[0.05, 0.14],
    jitter=[0.8, 0.8, 0.8, 0.2], gray=0.2, blur=[0.5, 0.5, 0.5],
    head_hidden=2048, bottleneck_dim=128, head_bn=True, num_prototypes=3000, freeze_prototypes=1,
    optimizer="lars", lr=0.3, min_lr=0.0048, warmup_epochs=10, epochs=400, batch_size=4096,
    weight_decay=1e-6, weight_decay_end=1e-6, clip_grad=0.0, queue=0,
    momentum=0.0, momentum_end=0.0,
    workers=10, log_every=100, eval_every=3120, eval_bank=50000, eval_queries=10000)
PRESETS["paper-deepcluster"] = dict(
    PRESETS["paper-swav"], method="deepcluster", prototypes="kmeans", epochs=800)
