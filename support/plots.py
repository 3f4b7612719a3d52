"""
Pictures of prototype sets: Fig. 1 (where they lie), Fig. 3a (unique against eps), Fig. 4a (over training), a montage.

Every function gets plain numbers and a file name. Colours are Okabe and Ito's, told apart by the colour-blind; lines
and markers differ too, for black and white print. matplotlib is imported only here, inside the functions.
"""
import itertools

import numpy as np
import torch

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX"
KAPPA, WIDTH = 20, .08  # Fig. 1: concentration of the von Mises-Fisher kernel (paper), Gaussian's sd (ours)
PANELS = (("knn", "k-NN (%)", 1), ("used", "used (%)", 100), ("perplexity", "perplexity / K (%)", 100),
          ("drift", "drift |c - c₀| / |c₀|", 1))


def figure(rows, cols, width, height):
    """A matplotlib figure with no window behind it, and its axes as a (rows, cols) array."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, cols, squeeze=False)


def save(fig, file):
    try:
        fig.savefig(file, dpi=150, facecolor="white")
    except (OSError, ValueError) as error:  # no such folder, unknown picture format
        raise ValueError(f"cannot write the picture {file}: {error}") from None


def looks(i, n):
    """Line style of curve i with n points: periods 7 and 5, so 35 curves all differ."""
    gap = max(1, n // 8)  # about 8 markers, staggered so that equal curves show
    return dict(color=COLOURS[i % 7], linestyle=STYLES[i % 5], marker=MARKERS[i % 7], markevery=(i % gap, gap),
                markersize=5, markerfacecolor="white", linewidth=1.6)


def training(runs, file, x="step"):
    """Fig. 4a: measures over training, one curve per run. runs: [(label, rows)], rows: [{column: float}], columns as in
    log.csv and x. Dotted beside unique: the ceiling, what prototypes that lie on the data could reach."""
    columns = {column for _, rows in runs for row in rows for column in row}
    eps_list = sorted((c.removeprefix("unique_") for c in columns if c.startswith("unique_")), key=float, reverse=True)
    panels = [(f"unique_{eps}", f"unique at ε = {eps} (%)", 100) for eps in eps_list]
    shown = [panel for panel in (*panels, *PANELS) if panel[0] in columns]
    if not shown:
        raise ValueError("nothing to draw over training: no run has an evaluated row in its log.csv")
    cols = min(3, len(shown))
    down = -(-len(shown) // cols)
    fig, axes = figure(down, cols, 3.5 * cols + .5, 2.7 * down + .3 + .25 * -(-len(runs) // 5))
    for ax, (column, title, factor) in itertools.zip_longest(axes.flat, shown, fillvalue=(None, "", 1)):
        if column is None:
            ax.axis("off")
            continue
        for i, (label, rows) in enumerate(runs):
            points = [(row[x], factor * row[column]) for row in rows if column in row]
            if points:
                ax.plot(*zip(*points), **looks(i, len(points)), label=label)
            ceiling = column.replace("unique", "ceiling")
            points = [(row[x], factor * row[ceiling]) for row in rows if ceiling in row and ceiling != column]
            if points:
                ax.plot(*zip(*points), color=COLOURS[i % 7], linestyle=":", linewidth=1.1)
        ax.set_title(title, fontsize=10, loc="left")
        ax.grid(alpha=.25)
        ax.spines[["top", "right"]].set_visible(False)
        if factor == 100:
            ax.set_ylim(-3, 104)
        elif ax.get_ylim()[0] > 0 and column == "drift":
            ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel(x)
    left, right = (f(row[x] for _, rows in runs for row in rows) for f in (min, max))
    margin = .04 * (right - left) or 1  # one scale in every panel, whatever a run has measured
    for ax in axes.flat:
        ax.set_xlim(left - margin, right + margin)
    handles, names = axes.flat[0].get_legend_handles_labels()
    if any(column.startswith("ceiling_") for column in columns):
        from matplotlib.lines import Line2D
        handles.append(Line2D([], [], color="grey", linestyle=":"))
        names.append("ceiling: random features")
    fig.legend(handles, names, loc="outside upper center", ncols=min(5, len(names)), frameon=False, fontsize=9,
               handlelength=3.2)
    save(fig, file)


def sweep(curves, baselines, file):
    """Fig. 3a: unique share against eps. curves, baselines (random directions): [(label, {eps: share}, K)]."""
    fig, axes = figure(1, 1, 6.5, 3.4 + .2 * (len(curves) + len(baselines)))
    ax = axes[0, 0]
    for label, share, K in baselines:
        ax.plot(share.keys(), [100 * s for s in share.values()], color="grey", linewidth=5, alpha=.35, label=label)
    for i, (label, share, K) in enumerate(curves):
        last = max(share)
        ax.plot(share.keys(), [100 * s for s in share.values()], **looks(i, len(share)),
                label=f"{label}: {round(share[last] * K):,} of {K:,} at {last:g}")
    ax.set(xlabel="ε  (duplicates: 1 - cos < ε)", ylabel="unique prototypes (%)", ylim=(-3, 104))
    ax.grid(alpha=.25)
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside upper left", frameon=False, fontsize=9, handlelength=3.5)
    save(fig, file)


def ablation(order, blocks, shown, file):
    """A finished table of ablate.py: a panel per measure, a line per row, seeds as points and their mean as a bar.
    blocks: {block: {row: [{measure: text}]}}, drawn side by side in colours; shown: [(measure, title, digits)]."""
    rows = [row for row in order if any(row in part for part in blocks.values())]
    fig, axes = figure(1, len(shown), 1.9 * len(shown) + 2, .34 * len(rows) * max(1, .4 * len(blocks)) + 1.3)
    for ax, (key, title, _) in zip(axes[0], shown):
        for b, (block, part) in enumerate(blocks.items()):
            shift = .5 * (b - (len(blocks) - 1) / 2) / len(blocks)
            for y, row in enumerate(rows):
                values = [float(r[key]) for r in part.get(row, []) if r[key]]
                if values:
                    ax.plot(values, [y + shift] * len(values), MARKERS[b], color=COLOURS[b], markersize=4, alpha=.55)
                    ax.plot([np.mean(values)] * 2, [y + shift - .17, y + shift + .17], color=COLOURS[b], linewidth=2.5,
                            label=block or "as shipped")
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_ylim(len(rows) - .5, -.5)
        ax.set_yticks(range(len(rows)), rows if ax is axes[0, 0] else [], fontsize=8)
        ax.tick_params(axis="x", labelsize=8)
        ax.grid(alpha=.25)
        ax.spines[["top", "right"]].set_visible(False)
        if not key.startswith("knn") and key != "drift":
            ax.set_xlim(-.05, 1.05)
    if len(blocks) > 1:
        handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels())}
        fig.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save(fig, file)


def plane(X):
    """Unit rows X (K, D) -> angles (K,) in the plane of their two main directions.

    Main directions of X as it is, not of X minus its mean: the mean IS the collapse when all prototypes point one way,
    and centring would turn that into an even cloud. Only the angle is kept (points on the circle): the projection of
    spread-out directions in high D is short, and would look like the tightest cluster of all."""
    X = X.double()
    axes = torch.linalg.eigh(X.T @ X)[1][:, -2:].flip(1)  # (D, min(D, 2)), the largest first
    xy = torch.nn.functional.pad(X @ axes, (0, 2 - axes.shape[1]))  # (K, 2); D = 1 has one axis
    xy = xy * (1 - 2 * (xy.mean(0) < 0).double())  # signs of eigenvectors are arbitrary: mean to the right
    return torch.atan2(xy[:, 1], xy[:, 0]).numpy()


def gaussian_kde(points, grid, width=WIDTH):
    """Density on grid x grid (G, G), [y, x], of points (K, 2): the mean of Gaussians of sd width. A kernel is a product
    of one in x and one in y, so the sum over points is a matrix product."""
    gx, gy = (np.exp(-.5 * ((grid[:, None] - points[:, d]) / width) ** 2) for d in (0, 1))  # (G, K) each
    return gy @ gx.T / (2 * np.pi * width ** 2 * len(points))


def vmf_kde(angles, grid, kappa=KAPPA):
    """Density over angles grid (G,) of angles (K,): the mean of von Mises-Fisher kernels exp(kappa cos) / 2 pi I0."""
    parts = np.array_split(angles, -(-len(angles) // 8192))  # bounds the (G, part) table
    total = sum(np.exp(kappa * (np.cos(grid[:, None] - part) - 1)).sum(1) for part in parts)
    return total / (2 * np.pi * np.i0(kappa) * np.exp(-kappa) * len(angles))


def fig1(sets, file):
    """Fig. 1: prototypes in the plane with a Gaussian KDE (top), their angles with a von Mises-Fisher KDE (bottom).
    sets: [(label, unit rows (K, D))], drawn side by side on one scale."""
    from math import pi
    fig, axes = figure(2, len(sets), 2.4 * len(sets) + 1, 4.6)
    grid, around = np.linspace(-1.3, 1.3, 161), np.linspace(-pi, pi, 361)
    angles = [plane(X) for _, X in sets]
    maps = [gaussian_kde(np.stack([np.cos(a), np.sin(a)], 1), grid) for a in angles]
    rounds = [vmf_kde(a, around) for a in angles]
    from matplotlib.colors import PowerNorm
    norm = PowerNorm(.4, 0, max(m.max() for m in maps))  # a collapsed set peaks 25 times above an even ring
    for i, (label, _) in enumerate(sets):
        top, low = axes[:, i]
        picture = top.imshow(maps[i], origin="lower", extent=(-1.3, 1.3) * 2, cmap="Blues", norm=norm)
        top.set_title(label if len(label) < 29 else "…" + label[-27:], fontsize=9)
        top.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        low.fill_between(np.degrees(around), rounds[i], color=COLOURS[0], alpha=.3)
        low.plot(np.degrees(around), rounds[i], color=COLOURS[0], linewidth=1.5)
        low.axhline(1 / (2 * pi), color="black", linestyle="--", linewidth=1)
        low.set(xlim=(-180, 180), xticks=(-90, 0, 90), xlabel="angle (°)")
        low.set_ylim(0, 1.08 * max(r.max() for r in rounds))
        low.tick_params(labelsize=8)
        top.tick_params(labelsize=8)
        if i:
            top.set_yticklabels([])
            low.set_yticklabels([])
    axes[0, 0].set_ylabel("main plane, on the circle", fontsize=9)
    axes[1, 0].set_ylabel("density (dashed: even)", fontsize=9)
    fig.colorbar(picture, ax=axes[0], shrink=.85, format="%.3g").set_label("density", fontsize=9)
    save(fig, file)


def montage(rows, file):
    """One row of images per prototype. rows: [(title, [(3, H, W) uint8 tensor, ...])]."""
    most = max(len(images) for _, images in rows)
    fig, axes = figure(len(rows), most, .75 * most + 2.2, .85 * len(rows))
    for (title, images), line in zip(rows, axes):
        for ax, image in itertools.zip_longest(line, images):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if image is not None:
                ax.imshow(np.asarray(image).transpose(1, 2, 0))
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    save(fig, file)
