"""The tables that lab/ablate.py runs: their rows, and what is measured of each.

A new row is one line here, and a new table one entry of TABLES.
"""
import config

# pieces of commands that several rows share
CARP = "--method carp --prototypes "
DINO = "--method dino --prototypes "
DECOUPLED = "--prototypes decoupled"
SINKHORN = DINO + "decoupled --targets sinkhorn"
RISING = " --teacher-temp 0.04 0.07 --teacher-temp-epochs 2"
FALLING = " --teacher-temp 0.05 0.025 --teacher-temp-epochs 3"
CONTROL = ("frozen random (control)", "--prototypes frozen")
# The design space of Eq. 3: who moves the prototypes, under two losses that keep them in use in
# two ways, and under CARP with a term that spreads the vectors. Sinkhorn-Knopp flattens targets
# with K above the rows of a step, so K is the batch there
MOVED_BY = {"joint": "joint", "kp": "kp", "frozen": "frozen", "kmeans": "kmeans",
            "clustered": "clustered", "clustered, joint student":
            "clustered --student-prototypes joint", "decoupled": "decoupled",
            "decoupled per sample": "decoupled --forgetting sample", "live": "live"}
BALANCED = "--method dino --targets sinkhorn --num-prototypes 64 --prototypes "
# with them the logits of `clustered` have CAPI's temperatures under DINO; see zoo/clustered.py
OF_CAPI = {"clustered": " --teacher-temp 0.5 0.5 --student-temp 1",
           "clustered, joint student": " --teacher-temp 0.5 0.5 --student-temp 0.12"}
SPREAD = "--method carp-uniform --prototypes "
# A loss of patches beside that of class tokens, whose prototypes are trained in all rows. Without
# the patches' loss this is DINO: patch prototypes then do not change the network, but those that
# follow the teacher still move
DENSE = "zoo/ibot.py --prototypes joint --patch-prototypes "
IN_DENSE = ["joint", "kp", "frozen", "decoupled", "decoupled per sample"]
NO_PATCH_LOSS = " --patch-weight 0 --mask-share 0"
# The clusters of CAPI's teacher, and over what its targets are balanced
CLUSTERS = {"as published": "clustered", "frozen clusters": "frozen", "mixture": "decoupled"}
BALANCED_OVER = {"each place": "place", "all patches": "all"}

# The instrument: what its k-NN does if a run is shorter or longer, and with other seeds
EPOCHS = config.parser().get_default("epochs")
SYSTEMS = {"CARP, joint": CARP + "joint", "CARP, frozen": CARP + "frozen",
           "CARP, decoupled": CARP + "decoupled", "DINO, joint": DINO + "joint --batch-size 32"}
LENGTHS = {"a third": 1 / 3, "default length": 1, "three times": 3}
INSTRUMENT = [(f"{system}, {length}", f"{command} --epochs {factor * EPOCHS:g}")
              for system, command in SYSTEMS.items() for length, factor in LENGTHS.items()]
LABELS = "labels, default length"

# name: (what it is, [(row, command)]). A command holds the flags of train.py, or a script of zoo/
# and its flags: "zoo/NAME.py --lr 0.01"
TABLES = {
    "main": ("method x prototype set", [
        ("CARP, joint", CARP + "joint"),
        ("CARP, kp", CARP + "kp"),
        ("CARP, frozen", CARP + "frozen"),
        ("CARP, decoupled", CARP + "decoupled"),
        ("CARP, live", CARP + "live"),
        ("DINO, joint", DINO + "joint"),
        ("DINO, kp", DINO + "kp"),
        ("DINO, vmf", DINO + "vmf"),
        ("DINO, frozen", DINO + "frozen"),
        ("DINO, decoupled", DINO + "decoupled"),
        ("DINO, live", DINO + "live")]),
    "A1": ("Table A.1 of the paper: components of the mixture", [
        ("no responsibility forgetting", f"{DECOUPLED} --forgetting plain"),
        ("no annealing, no rescaling", f"{DECOUPLED} --beta 1 1 --no-rescale"),
        ("no annealing", f"{DECOUPLED} --beta 1 1"),
        ("no annealing, resurrect, rescaling", f"{DECOUPLED} --beta 1 1 --resurrect 0"),
        ("no resurrect, rescaling", f"{DECOUPLED} --resurrect 0"),
        ("full, as printed", DECOUPLED),
        CONTROL]),
    "A2": ("Table A.2: a and c of the forgetting factor", [
        ("a 0.001, c 0.75", f"{DECOUPLED} --eta-a 0.001 --eta-c 0.75"),
        ("a 0.001, c 0.95", f"{DECOUPLED} --eta-a 0.001 --eta-c 0.95"),
        ("a 0.0005, c 0.89", f"{DECOUPLED} --eta-a 0.0005 --eta-c 0.89"),
        ("a 0.002, c 0.89", f"{DECOUPLED} --eta-a 0.002 --eta-c 0.89"),
        ("a 0.001, c 0.89", f"{DECOUPLED} --eta-a 0.001 --eta-c 0.89"),
        CONTROL]),
    "C3": ("Table C.3: DINO with decoupled prototypes, one change at a time", [
        ("joint, centre", DINO + "joint" + RISING),
        ("decoupled, centre", DINO + "decoupled" + RISING),
        ("+ Sinkhorn-Knopp", SINKHORN + RISING),
        ("+ temperature .05 to .025", SINKHORN + FALLING),
        ("+ K / 8", SINKHORN + FALLING + " --num-prototypes 128"),
        ("+ K / 4 instead", SINKHORN + FALLING + " --num-prototypes 256"),
        ("frozen, Sinkhorn-Knopp (control)", DINO + "frozen --targets sinkhorn" + FALLING)]),
    "choices": ("points the paper leaves open: beta, exponent, means in the logits, start, scale", [
        ("as shipped", DECOUPLED),
        ("beta 1", f"{DECOUPLED} --beta 1 1"),
        ("exponent per sample", f"{DECOUPLED} --forgetting sample"),
        ("raw means in the logits", f"{DECOUPLED} --proto-norm raw"),
        ("start at 0, features", f"{DECOUPLED} --gmm-start 0 --gmm-init features"),
        ("start at three quarters, features", f"{DECOUPLED} --gmm-init features"),
        ("variance floor .1", f"{DECOUPLED} --var-floor 0.1"),
        ("unit h, scale 20", f"{DECOUPLED} --head-norm --logit-scale 20"),
        ("unit h, scale 20, frozen (control)", "--prototypes frozen --head-norm --logit-scale 20"),
        CONTROL]),
    "longtail": ("long tail, largest class over smallest 100; head: above 1,000 images, "
                 "tail: below 200", [
                     ("CARP, joint", CARP + "joint --imbalance 100"),
                     ("CARP, kp", CARP + "kp --imbalance 100"),
                     ("CARP, frozen", CARP + "frozen --imbalance 100"),
                     ("CARP, decoupled", CARP + "decoupled --imbalance 100"),
                     ("CARP, live", CARP + "live --imbalance 100")]),
    "space": ("who moves the prototypes", [
        *[(f"CARP, {name}", CARP + flags) for name, flags in MOVED_BY.items()],
        *[(f"CARP + uniformity, {name}", SPREAD + MOVED_BY[name])
          for name in ("frozen", "kmeans", "clustered", "live")],
        *[(f"DINO + Sinkhorn, {name}", BALANCED + flags + OF_CAPI.get(name, ""))
          for name, flags in MOVED_BY.items()],
        # the control of "clustered, joint student"
        ("DINO + Sinkhorn, frozen, joint student", f"{BALANCED}frozen --student-prototypes joint"),
        ("SOP, bank", "--method sop --prototypes bank --num-prototypes 128")]),
    "dense": ("who moves the prototypes of patches", [
        *[(f"iBOT, {name}", DENSE + MOVED_BY[name]) for name in IN_DENSE],
        ("iBOT, decoupled, place mean", DENSE + "decoupled --place-mean"),
        *[(f"DINO, {name}", DENSE + MOVED_BY[name] + NO_PATCH_LOSS)
          for name in ("joint", "decoupled", "decoupled per sample")]]),
    # the same with the weight of iBOT: when class tokens begin to learn is then a matter of luck
    "dense_weight_1": ("who moves the prototypes of patches, whose loss has the weight 1", [
        *[(f"iBOT, {name}", f"{DENSE}{MOVED_BY[name]} --patch-weight 1") for name in IN_DENSE],
        ("iBOT, decoupled, place mean", f"{DENSE}decoupled --place-mean --patch-weight 1")]),
    "capi": ("who moves the clusters of CAPI's teacher", [
        *[(f"{kind}, {over}", f"zoo/capi.py --prototypes {flag} --sinkhorn {rule}")
          for kind, flag in CLUSTERS.items() for over, rule in BALANCED_OVER.items()],
        ("frozen student, each place", "zoo/capi.py --student-prototypes frozen")]),
    "instrument": ("what the default run can tell: length, seeds, room above",
                   [*INSTRUMENT, (LABELS, "--method supervised --prototypes joint")]),
}
SEEDS = [0, 1, 2]
# rows of "instrument" whose spread over seeds is a claim
FIVE_SEEDS = [f"{system}, default length" for system in SYSTEMS]

# (column of the file, its title in the table, digits)
MEASURES = [("knn", "k-NN", 1), ("unique_0.025", "unique(.025)", 3),
            ("unique_0.5", "unique(.5)", 3), ("ceiling_0.5", "ceiling(.5)", 3), ("used", "used", 3),
            ("perplexity", "perplexity", 3), ("drift", "drift", 3)]
# of the vectors and of their logits, beside the prototypes
VECTORS = [("h_rank", "rank h", 1), ("h_cosine", "cos h", 2), ("z_sd", "sd z", 2),
           ("ms_per_step", "ms/step", 0)]
GROUPS = [("knn_head", "head", 1), ("knn_medium", "medium", 1), ("knn_tail", "tail", 1)]
# of patches: their prototypes, and what the network knows of them, by lab/eval_dense.py
PATCHES = [("miou", "mIoU", 1),
           *[(f"patch_{column}", title, digits) for column, title, digits in MEASURES[2:]],
           ("patch_place_nats", "place", 2), ("patch_place_nats_shuffled", "shuffled", 2)]
# of CAPI: its features and targets, and its second set of prototypes
TARGETS = [("attentive", "attentive", 1), ("target_entropy", "entropy of targets", 2),
           ("entropy_floor", "about at least", 2), ("place_nats", "place", 2),
           ("place_nats_shuffled", "shuffled", 2)]
STUDENTS = [(f"student_{column}", title, digits) for column, title, digits in MEASURES[1:]]
# what untrained weights and raw pixels reach
UNLEARNED = ["raw_knn", "untrained_knn", "raw_miou", "untrained_miou"]
# block: the flags after --; command: the script of the run and its flags
FIELDS = ["row", "seed", "block",
          *dict.fromkeys(column for column, _, _ in
                         MEASURES + VECTORS + GROUPS + PATCHES + TARGETS + STUDENTS),
          "ceiling_0.025", "h_norm", *UNLEARNED, "steps", "command", "hardware", "torch", "date",
          "data_version"]


def parts(name):
    """[(heading or "", measures as in MEASURES)]: the Markdown tables in which a table is shown.

    They stand one below the other, where all measures do not fit into a line of 100 characters.
    """
    if name.startswith("dense"):
        of_class = [m for m in MEASURES if m[0] != "unique_0.025"] + VECTORS[:1]
        return [("class tokens", of_class), ("patches", PATCHES)]
    if name == "capi":
        return [("features", [MEASURES[0], PATCHES[0], TARGETS[0]]), ("targets", TARGETS[1:]),
                ("teacher's clusters", MEASURES[1:]), ("student's set", STUDENTS)]
    if name == "space":
        ceiling, = (m for m in MEASURES if m[0] == "ceiling_0.5")  # of random vectors
        return [("", [m for m in MEASURES if m != ceiling]), ("vectors", [ceiling, *VECTORS])]
    if name == "longtail":
        return [("", MEASURES[:1] + GROUPS + [m for m in MEASURES[1:] if m[0] != "ceiling_0.5"])]
    return [("", MEASURES)]


def measures(name):
    """All that a table shows, as in MEASURES."""
    return [measure for _, part in parts(name) for measure in part]
