"""The file of a table, results/TABLE.csv, and the table that is printed and drawn from it."""
import csv
import io
import math
import os
import statistics
import textwrap

from lab.tables import FIELDS, LABELS, LENGTHS, SYSTEMS, TABLES, measures, parts
from support import plots
from support.files import TEXT, write


# ---- the file ----------------------------------------------------------------------------------
def read(file, columns):
    """The rows of a csv file as dicts of text; none where there is no file.

    ValueError if it is no table, or lacks one of these columns.
    """
    if not os.path.exists(file):
        return []
    try:
        with open(file, newline="", **TEXT) as f:
            table = csv.DictReader(f)
            rows, there = list(table), table.fieldnames or []
    except csv.Error as error:
        raise ValueError(f"{file} is not a csv file: {error}") from None
    lacking = [column for column in columns if column not in there]
    if lacking:
        raise ValueError(f"{file} lacks the column {lacking[0]}")
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{file} has rows with more or fewer cells than columns")
    return rows


def read_results(name, file):
    """The rows of a table's file, as `add` wrote them; ValueError for another file."""
    numbers = ["raw_knn", "untrained_knn", *[column for column, _, _ in measures(name)]]
    results = read(file, ["row", "seed", "block", "steps", "hardware", "torch", "date", *numbers])
    if results and not rows_of_table(name, results):
        raise ValueError(f"{file} has no row of the table {name}")
    for result in results:
        for column in numbers:
            try:
                float(result[column] or 0)
            except ValueError:
                raise ValueError(f"{file}: {column} {result[column]!r} is no number") from None
    return results


def rows_of_table(name, results):
    """The results of rows that the table has; a file may have more, of an earlier version of it."""
    rows = [row for row, _ in TABLES[name][1]]
    return [result for result in results if result["row"] in rows]


def add(file, results, result):
    """Write the results and one more; the old file stays whole until the new one is. Columns that
    somebody has added by hand stay."""
    text = io.StringIO()
    by_hand = [column for column in (results[0] if results else {}) if column not in FIELDS]
    writer = csv.DictWriter(text, FIELDS + by_hand, restval="", extrasaction="ignore",
                            lineterminator="\n")
    writer.writeheader()
    writer.writerows([*results, result])
    write(file, lambda f: f.write(text.getvalue().encode(**TEXT)))


def is_done(run, block, results):
    """Whether the results hold this run with the flags `block` after --."""
    done = {(result["row"], result["seed"], result["block"]) for result in results}
    return (run.row, str(run.seed), block) in done


# ---- the printed table -------------------------------------------------------------------------
def blocks(results):
    """{block: {row: [results, one a seed]}} of the file's rows."""
    out = {}
    for result in results:
        out.setdefault(result["block"], {}).setdefault(result["row"], []).append(result)
    return out


def mean(results, column, digits):
    """Mean over the results that have the column, as text; "-" if none has."""
    values = [float(result[column]) for result in results if result.get(column)]
    return f"{statistics.mean(values):.{digits}f}" if values else "-"


def deviation(results, column, digits):
    """Standard deviation over the results that have the column, as text; "" for fewer than two."""
    values = [float(result[column]) for result in results if result.get(column)]
    return f"{spread(values):.{digits}f}" if len(values) > 1 else ""


def spread(values):
    """Standard deviation of at least two numbers; nan where one is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def table(name, results):
    """The Markdown text of a finished table, block by block."""
    return "\n".join(line for block, rows in blocks(rows_of_table(name, results)).items()
                     for line in lines_of_block(name, block, rows))


def lines_of_block(name, block, rows):
    """[line] for the rows {row: [results]} of one block: what it is, and its tables.

    A row holds means over seeds, and the row below it, "± sd", their standard deviations.
    """
    order = [row for row, _ in TABLES[name][1] if row in rows]
    results = [result for row in order for result in rows[row]]
    command = f"python -m lab.ablate {name}" + (f" -- {block}" if block else "")

    def values(column):
        """The different ones in a column, as text; numbers by their size."""
        return " and ".join(sorted({result[column] for result in results},
                                   key=lambda text: (text.isdigit() and int(text), text)))

    raw, untrained = mean(results, "raw_knn", 1), mean(results, "untrained_knn", 1)
    notes = [f"* {TABLES[name][0]}",
             f"* {values('steps')} steps; k-NN of raw pixels {raw}, of the untrained backbone "
             f"{untrained}",
             f"* {values('hardware')}, torch {values('torch')}, "
             f"{max(result['date'] for result in results)}"]
    if any(result.get("raw_miou") for result in results):
        raw, untrained = mean(results, "raw_miou", 1), mean(results, "untrained_miou", 1)
        notes.insert(2, f"* mIoU of raw pixels {raw}, of the untrained backbone {untrained}")
    lines = [f"`{command}`", "", *wrapped(notes)]
    for heading, shown in parts(name):
        lines += ["",
                  f"| {heading or 'row'} | runs | {' | '.join(title for _, title, _ in shown)} |",
                  "|---|---|" + "---|" * len(shown)]
        for row in order:
            cells = [mean(rows[row], column, digits) for column, _, digits in shown]
            lines.append(f"| {row} | {len(rows[row])} | {' | '.join(cells)} |")
            if len(rows[row]) > 1:
                cells = [deviation(rows[row], column, digits) for column, _, digits in shown]
                lines.append(f"| ± sd | | {' | '.join(cells)} |")
    if name == "instrument":
        lines += ["", *wrapped(verdict(rows))]
    return [*lines, ""]


def wrapped(items):
    """The lines of items "* ...", at most 98 columns wide."""
    return [line for item in items for line in textwrap.wrap(item, 98, subsequent_indent="  ")]


def verdict(rows):
    """[line]: what the rows {row: [results]} of the table "instrument" say of the default run.

    A claim that lacks a run says so.
    """
    def knn(row):
        """{seed: k-NN} of a row."""
        return {result["seed"]: float(result["knn"]) for result in rows.get(row, [])
                if result["knn"]}

    def line(claim, values, least=-math.inf, most=math.inf):
        if None in values.values():
            return f"* {claim}: not run"
        met = all(least <= value <= most for value in values.values())
        told = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
        return f"* {claim}: {'met' if met else 'NOT MET'} ({told})"

    def difference(a, b):
        """Mean of a - b over the seeds that both have; None without one."""
        shared = a.keys() & b.keys()
        return statistics.mean(a[seed] - b[seed] for seed in shared) if shared else None

    of_length = {length: {s: knn(f"{s}, {length}") for s in SYSTEMS} for length in LENGTHS}
    third, default, three = (of_length[length] for length in
                             ("a third", "default length", "three times"))
    controls = {s: {r["seed"]: max(float(r["raw_knn"]), float(r["untrained_knn"]))
                    for r in rows.get(f"{s}, default length", [])
                    if r["raw_knn"] and r["untrained_knn"]} for s in SYSTEMS}
    return [
        line("(a) three times the length gains, or loses at most 0.5 points",
             {s: difference(three[s], default[s]) for s in SYSTEMS}, least=-0.5),
        line("(a) the default length gains on a third of it, or loses at most 0.5 points",
             {s: difference(default[s], third[s]) for s in SYSTEMS}, least=-0.5),
        line("(b) standard deviation over seeds at most 1.5 points",
             {s: spread(list(default[s].values())) if len(default[s]) > 1 else None
              for s in SYSTEMS}, most=1.5),
        line("(c) at least 20 points above raw pixels and the untrained backbone",
             {s: difference(default[s], controls[s]) for s in SYSTEMS}, least=20),
        line("(d) at most 88 % at the default length",
             {s: statistics.mean(default[s].values()) if default[s] else None
              for s in SYSTEMS}, most=88),
        line("(d) labels reach at least 5 points more",
             {s: difference(knn(LABELS), default[s]) for s in SYSTEMS}, least=5)]


def draw(name, results, file):
    """The picture of a table. ValueError without matplotlib, or with nothing to draw."""
    rows = rows_of_table(name, results)
    if name == "space":
        columns = ("knn", "unique_0.5", "used")
        by_block = blocks(rows)
        # runs without flags after --; the first block of the file if there are none
        first = by_block.get("") or next(iter(by_block.values()))
        means = {row: {column: float(mean(first[row], column, 6)) for column in columns}
                 | {"knn_sd": float(deviation(first[row], "knn", 6) or 0)}
                 for row, _ in TABLES[name][1]
                 # a memory has no unique share, and images without labels have no k-NN
                 if row in first and all(first[row][0][column] for column in columns)}
        if not means:
            raise ValueError("no row has k-NN, unique(.5) and used")
        plots.space(means, file)
    else:
        order = [row for row, _ in TABLES[name][1]]
        plots.ablation(order, blocks(rows), parts(name), file)
