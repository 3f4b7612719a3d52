"""
Pictures of prototype sets: Fig. 1 (where they lie), Fig. 3a (unique against eps), Fig. 4a (over
training), the table of an ablation, the design space, images per prototype, and labels of pixels.

A function that draws gets plain numbers and the name of the picture file. It raises ValueError
where matplotlib is missing, and OSError where the file cannot be written. The colours are those of
Okabe and Ito, which the colour-blind can tell apart; lines and markers differ too, for black and
white print. matplotlib is imported inside the functions, so that nothing else needs it.
"""
import itertools
import math
import os

import numpy as np
import torch

from support.files import write
from support.pixels import IGNORED

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX"
KAPPA = 20  # Fig. 1: concentration of the von Mises-Fisher kernel, as in the paper
BANDWIDTH = .08  # Fig. 1: standard deviation of the Gaussian kernel; the paper does not state it
# Measures over training beside unique: column of log.csv, title, factor.
PANELS = (("knn", "k-NN (%)", 1), ("used", "used (%)", 100),
          ("perplexity", "perplexity / K (%)", 100), ("drift", "drift |c - c₀| / |c₀|", 1))


# ---- what all pictures share --------------------------------------------------------------------
def figure(rows, columns, width, height):
    """A matplotlib figure with no window behind it, and its axes as a (rows, columns) array; width
    and height in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def check_files(*files):
    """ValueError where no picture can have these names (None is left out), or be drawn at all."""
    fig, _ = figure(1, 1, 1, 1)
    formats = fig.canvas.get_supported_filetypes()
    for file in files:
        if file is not None and suffix(file) not in formats:
            raise ValueError(f"the picture {file} must end in one of .{', .'.join(formats)}")


def suffix(file):
    """The format of a picture by its name, as matplotlib has it: png without one."""
    return os.path.splitext(file)[1][1:].lower() or "png"


def save(fig, file):
    """Write the picture, whole or not at all. OSError if it cannot be written."""
    write(file, lambda f: fig.savefig(f, format=suffix(file), dpi=150, facecolor="white"))


def colour(i):
    return COLOURS[i % len(COLOURS)]


def marker(i):
    return MARKERS[i % len(MARKERS)]


def line_style(i, n):
    """Keywords for `plot` of curve i, which has n points. Colours and markers repeat after 7
    curves, line styles after 5, so 35 curves all differ."""
    gap = max(1, n // 8)  # about 8 markers on a curve
    return {"color": colour(i), "linestyle": STYLES[i % len(STYLES)], "marker": marker(i),
            "markevery": (i % gap, gap),  # not at the same points, so that equal curves show
            "markersize": 5, "markerfacecolor": "white", "linewidth": 1.6}


def open_frame(ax):
    """A light grid, and no frame at the top and on the right."""
    ax.grid(alpha=.25)
    ax.spines[["top", "right"]].set_visible(False)


# ---- Fig. 4a ------------------------------------------------------------------------------------
def training(runs, file, x="step", chosen=None):
    """Fig. 4a: measures over training, one curve per run.

    runs: [(label, [{column: float}])], with the columns of log.csv and x. Dotted beside unique: the
    ceiling, what prototypes that lie on the data could reach. chosen: the columns that get a panel,
    None: all measures. ValueError where no row has a measure, or none has a chosen one."""
    columns = {column for _, rows in runs for row in rows for column in row}
    panels = panels_of(columns)
    for column in chosen or []:
        if column not in [name for name, _, _ in panels]:
            raise ValueError(f"--panels {column} is not among the measures of these runs: "
                             f"{', '.join(name for name, _, _ in panels)}")
    if chosen:
        panels = [panel for column in chosen for panel in panels if panel[0] == column]
    if not panels:
        raise ValueError("nothing to draw over training: no run has an evaluated row in its "
                         "log.csv")
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    legend_lines = math.ceil(len(runs) / 5)
    fig, axes = figure(down, across, 3.5 * across + .5, 2.7 * down + .3 + .25 * legend_lines)
    for ax, panel in itertools.zip_longest(axes.flat, panels):
        if panel is None:
            ax.axis("off")
        else:
            training_panel(ax, runs, x, *panel)
    for ax in axes[-1]:
        ax.set_xlabel(x)
    steps = [row[x] for _, rows in runs for row in rows]
    margin = .04 * (max(steps) - min(steps)) or 1
    for ax in axes.flat:  # one scale in every panel, whatever a run has measured
        ax.set_xlim(min(steps) - margin, max(steps) + margin)
    of_name = {}  # {name: line}; a run may have no curve in the first panel
    for ax in axes.flat:
        for handle, name in zip(*ax.get_legend_handles_labels()):
            of_name.setdefault(name, handle)
    handles, names = list(of_name.values()), list(of_name)
    ceilings = {column.replace("unique", "ceiling") for column, _, _ in panels
                if column.startswith("unique")}
    if ceilings & columns:
        from matplotlib.lines import Line2D
        handles.append(Line2D([], [], color="grey", linestyle=":"))
        names.append("ceiling: random features")
    fig.legend(handles, names, loc="outside upper center", ncols=min(5, len(names)),
               frameon=False, fontsize=9, handlelength=3.2)
    save(fig, file)


def panels_of(columns):
    """[(column, title, factor)]: unique at every eps, the largest first, then PANELS, as far as
    they are among the columns."""
    eps_list = [c.removeprefix("unique_") for c in columns if c.startswith("unique_")]
    panels = [(f"unique_{eps}", f"unique at ε = {eps} (%)", 100)
              for eps in sorted(eps_list, key=float, reverse=True)]
    return panels + [panel for panel in PANELS if panel[0] in columns]


def training_panel(ax, runs, x, column, title, factor):
    for i, (label, rows) in enumerate(runs):
        points = [(row[x], factor * row[column]) for row in rows if column in row]
        if points:
            ax.plot(*zip(*points), **line_style(i, len(points)), label=label)
        if column.startswith("unique"):
            ceiling = column.replace("unique", "ceiling")
            points = [(row[x], factor * row[ceiling]) for row in rows if ceiling in row]
            if points:
                ax.plot(*zip(*points), color=colour(i), linestyle=":", linewidth=1.1)
    ax.set_title(title, fontsize=10, loc="left")
    open_frame(ax)
    if factor == 100:
        ax.set_ylim(-3, 104)
    elif ax.get_ylim()[0] > 0 and column == "drift":
        ax.set_ylim(bottom=0)


# ---- Fig. 3a ------------------------------------------------------------------------------------
def sweep(curves, baselines, file):
    """Fig. 3a: unique share against eps. curves, and baselines (random directions):
    [(label, {eps: share}, K)]."""
    fig, axes = figure(1, 1, 6.5, 3.4 + .2 * (len(curves) + len(baselines)))
    ax = axes[0, 0]
    for label, share, _ in baselines:
        ax.plot(share.keys(), [100 * s for s in share.values()], color="grey", linewidth=5,
                alpha=.35, label=label)
    for i, (label, share, K) in enumerate(curves):
        eps = max(share)
        ax.plot(share.keys(), [100 * s for s in share.values()], **line_style(i, len(share)),
                label=f"{label}: {round(share[eps] * K):,} of {K:,} at {eps:g}")
    ax.set(xlabel="ε  (duplicates: 1 - cos < ε)", ylabel="unique prototypes (%)", ylim=(-3, 104))
    open_frame(ax)
    fig.legend(loc="outside upper left", frameon=False, fontsize=9, handlelength=3.5)
    save(fig, file)


# ---- a table of lab/ablate.py -------------------------------------------------------------------
def ablation(order, blocks, parts, file):
    """A panel per measure, a line per row of the table, seeds as points and their mean as a bar.

    order: names of the rows. blocks: {block: {row: [{measure: text}, one per seed]}}, drawn one
    below the other, in colours. parts: [(heading, [(measure, title, digits)])], a row of panels
    each. Shares of a set have a common scale, other measures one of their own.
    """
    rows = [row for row in order if any(row in results for results in blocks.values())]
    widest = max(len(measures) for _, measures in parts)
    height = .34 * len(rows) * max(1, .4 * len(blocks)) + 1.3
    fig, axes = figure(len(parts), widest, 1.9 * widest + 2, height * len(parts))
    for of_part, (heading, measures) in zip(axes, parts):
        for ax, measure in itertools.zip_longest(of_part, measures):
            if measure is None:
                ax.axis("off")
                continue
            column, title, _ = measure
            ablation_panel(ax, rows, blocks, column)
            ax.set_title(f"{heading}\n{title}" if heading else title, fontsize=9, loc="left")
            ax.set_yticks(range(len(rows)), rows if ax is of_part[0] else [], fontsize=8)
    if len(blocks) > 1:
        handles = {}
        for ax in axes.flat:
            for handle, label in zip(*ax.get_legend_handles_labels()):
                handles[label] = handle
        fig.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False,
                   fontsize=8)
    save(fig, file)


def ablation_panel(ax, rows, blocks, column):
    for i, results in enumerate(blocks.values()):
        shift = .5 * (i - (len(blocks) - 1) / 2) / len(blocks)
        for line, row in enumerate(rows):
            values = [float(r[column]) for r in results.get(row, []) if r[column]]
            if not values:
                continue
            y = line + shift
            ax.plot(values, [y] * len(values), marker(i), color=colour(i), markersize=4, alpha=.55)
            mean = np.mean(values)
            ax.plot([mean, mean], [y - .17, y + .17], color=colour(i), linewidth=2.5,
                    label=list(blocks)[i] or "as shipped")
    ax.set_ylim(len(rows) - .5, -.5)
    ax.tick_params(axis="x", labelsize=8)
    open_frame(ax)
    if any(share in column for share in ("unique", "ceiling", "used", "perplexity")):
        ax.set_xlim(-.05, 1.05)


# ---- the design space ----------------------------------------------------------------------------
def space(rows, file):
    """A point for each row of a table: k-NN over the share of unique prototypes, the area of the
    point being the share that is used. A bar is one standard deviation over seeds up and down.

    rows: {name: {"knn": percent, "knn_sd": percent, "unique_0.5": share, "used": share}}. The part
    of a name before its comma is the loss, which has a panel of its own; the part after it is
    written beside the point.
    """
    losses = list(dict.fromkeys(name.split(", ", 1)[0] for name in rows))
    fig, axes = figure(1, len(losses), 3.6 * len(losses) + .5, 4)
    for i, (ax, loss) in enumerate(zip(axes[0], losses)):
        own = {name.split(", ", 1)[1]: row for name, row in rows.items()
               if name.startswith(f"{loss}, ")}
        x, y = ([row[column] for row in own.values()] for column in ("unique_0.5", "knn"))
        area = [10 + 500 * row["used"] for row in own.values()]  # in points squared; 0 is visible
        ax.scatter(x, y, s=area, color=colour(i), alpha=.4, edgecolor="black", linewidth=.5)
        ax.errorbar(x, y, [row["knn_sd"] for row in own.values()], fmt="none", ecolor="grey",
                    elinewidth=.6)
        # names of points at one height would cover each other: they stand apart, in order of height
        low, high = ax.get_ylim()
        heights = apart(y, .05 * (high - low))
        for name, at, knn, height in zip(own, x, y, heights):
            right = at < .5  # of the point, where there is room
            ax.annotate(name, (at, knn), (at + (.08 if right else -.08), height), va="center",
                        ha="left" if right else "right", fontsize=7,
                        arrowprops={"arrowstyle": "-", "linewidth": .4, "color": "grey"})
        ax.set_title(loss, fontsize=9, loc="left")
        ax.set_xlim(-.08, 1.12)
        ax.set_ylim(min(low, *heights), max(high, *heights))
        ax.set_xlabel("unique(.5)", fontsize=8)
        ax.set_ylabel("k-NN (%)", fontsize=8)
        ax.tick_params(labelsize=8)
        open_frame(ax)
    save(fig, file)


def apart(values, distance):
    """The values moved up so far that any two are at least `distance` apart; in the same order."""
    moved, last = list(values), -math.inf
    for i in sorted(range(len(values)), key=values.__getitem__):
        moved[i] = last = max(values[i], last + distance)
    return moved


# ---- Fig. 1 -------------------------------------------------------------------------------------
def plane(X):
    """Unit rows X (K, D) -> angles (K,) in the plane of their two main axes, as NumPy.

    The axes are those of X as it is, not of X minus its mean: where all prototypes point one way,
    the mean is the collapse itself, and without it an even cloud would remain. Only the angle is
    used (points on the circle): the projection of spread-out directions in high D is short, and
    would look like the tightest cluster of all."""
    X = X.double()
    axes = torch.linalg.eigh(X.T @ X)[1][:, -2:].flip(1)  # (D, min(D, 2)), the main one first
    xy = torch.nn.functional.pad(X @ axes, (0, 2 - axes.shape[1]))  # (K, 2); D = 1 has one axis
    xy = xy * (1 - 2 * (xy.mean(0) < 0).double())  # signs of axes are arbitrary: mean to the right
    return torch.atan2(xy[:, 1], xy[:, 0]).numpy()


def gaussian_kde(points, grid, bandwidth=BANDWIDTH):
    """Density on grid x grid, (G, G) as [y, x], of points (K, 2): the mean of Gaussians of that
    standard deviation. Each is a product of one in x and one in y, so the sum over points is a
    matrix product."""
    along_x = np.exp(-.5 * ((grid[:, None] - points[:, 0]) / bandwidth) ** 2)  # (G, K)
    along_y = np.exp(-.5 * ((grid[:, None] - points[:, 1]) / bandwidth) ** 2)  # (G, K)
    return along_y @ along_x.T / (2 * np.pi * bandwidth ** 2 * len(points))  # (G, G)


def vmf_kde(angles, grid, kappa=KAPPA):
    """Density (G,) over the angles grid (G,) of angles (K,): the mean of von Mises-Fisher kernels
    exp(kappa cos) / (2 pi I0(kappa))."""
    total = 0
    for part in np.array_split(angles, math.ceil(len(angles) / 8192)):  # bounds the (G, part) table
        total = total + np.exp(kappa * (np.cos(grid[:, None] - part) - 1)).sum(1)  # (G,)
    return total / (2 * np.pi * np.i0(kappa) * np.exp(-kappa) * len(angles))


def fig1(sets, file):
    """Fig. 1: prototypes in their main plane with a Gaussian KDE (upper row), and their angles with
    a von Mises-Fisher KDE (lower row). sets: [(label, unit rows (K, D))], side by side on one
    scale."""
    fig, axes = figure(2, len(sets), 2.4 * len(sets) + 1, 4.6)
    from matplotlib.colors import PowerNorm
    grid = np.linspace(-1.3, 1.3, 161)
    circle = np.linspace(-math.pi, math.pi, 361)
    angles = [plane(X) for _, X in sets]
    maps = [gaussian_kde(np.stack([np.cos(a), np.sin(a)], 1), grid) for a in angles]
    densities = [vmf_kde(a, circle) for a in angles]
    # A collapsed set peaks 25 times above an even ring, hence the power.
    norm = PowerNorm(.4, 0, max(m.max() for m in maps))
    highest = max(density.max() for density in densities)
    for i, (label, _) in enumerate(sets):
        upper, lower = axes[:, i]
        picture = upper.imshow(maps[i], origin="lower", extent=(-1.3, 1.3, -1.3, 1.3),
                               cmap="Blues", norm=norm)
        upper.set_title(label if len(label) < 29 else "…" + label[-27:], fontsize=9)
        upper.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        lower.fill_between(np.degrees(circle), densities[i], color=COLOURS[0], alpha=.3)
        lower.plot(np.degrees(circle), densities[i], color=COLOURS[0], linewidth=1.5)
        lower.axhline(1 / (2 * math.pi), color="black", linestyle="--", linewidth=1)
        lower.set(xlim=(-180, 180), xticks=(-90, 0, 90), xlabel="angle (°)")
        lower.set_ylim(0, 1.08 * highest)
        upper.tick_params(labelsize=8)
        lower.tick_params(labelsize=8)
        if i:
            upper.set_yticklabels([])
            lower.set_yticklabels([])
    axes[0, 0].set_ylabel("main plane, on the circle", fontsize=9)
    axes[1, 0].set_ylabel("density (dashed: even)", fontsize=9)
    bar = fig.colorbar(picture, ax=axes[0], shrink=.85, format="%.3g")
    bar.set_label("density", fontsize=9)
    save(fig, file)


# ---- images per prototype -----------------------------------------------------------------------
def montage(rows, file):
    """One row of images per prototype. rows: [(title, [(3, H, W) uint8 tensor, ...])]."""
    most = max(len(images) for _, images in rows)
    fig, axes = figure(len(rows), most, .75 * most + 2.2, .85 * len(rows))
    for (title, images), row_axes in zip(rows, axes):
        for ax, image in itertools.zip_longest(row_axes, images):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if image is not None:
                ax.imshow(np.asarray(image).transpose(1, 2, 0))
        row_axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    save(fig, file)


# ---- labels of pixels ---------------------------------------------------------------------------
def class_colours(C):
    """(256, 3) floats in [0, 1]: black for class 0, white for IGNORED, and the circle of hues,
    light and dark in turns, for the classes between."""
    from matplotlib.colors import hsv_to_rgb
    table = np.ones((IGNORED + 1, 3))
    table[0] = 0
    for c in range(1, C):
        table[c] = hsv_to_rgb(((c - 1) / (C - 1), .85, .95 if c % 2 else .6))
    return table


def segmentation(images, columns, classes, file):
    """A row for each of the images (m, 3, S, S) uint8: the image, and its label map in each of the
    columns {title: maps (m, S, S)}. The names of the classes that occur stand below."""
    fig, axes = figure(len(images), 1 + len(columns), 1.6 * (1 + len(columns)),
                       1.6 * len(images) + .8)
    from matplotlib.patches import Patch
    table = class_colours(len(classes))
    for i, row in enumerate(axes):
        shown = [images[i].permute(1, 2, 0).numpy()]  # (S, S, 3)
        shown += [table[maps[i].numpy()] for maps in columns.values()]  # (S, S, 3) each
        for ax, content in zip(row, shown):
            ax.imshow(content, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    for ax, title in zip(axes[0], ["image", *columns]):
        ax.set_title(title, fontsize=9)
    there = set(torch.cat([maps.flatten() for maps in columns.values()]).unique().tolist())
    handles = [Patch(facecolor=table[c], edgecolor="grey", label=name)
               for c, name in [*enumerate(classes), (IGNORED, "ignored")] if c in there]
    fig.legend(handles=handles, loc="outside lower center", ncols=1 + len(columns),
               frameon=False, fontsize=7)
    save(fig, file)
