"""What a run prints and writes: OUT/log.csv, OUT/args.json, the values of each step, its speed."""
import contextlib
import csv
import ctypes
import io
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass

import torch

from support import ddp
from support.files import TEXT, write

# Columns that every run has, in order. What a loss, a prototype set or an evaluation adds comes
# after "loss_over_ln_k" (terms of the loss) or at the end.
COLUMNS = ["step", "epoch", "loss", "loss_over_ln_k", "raw_knn", "knn", "unique_0.025",
           "unique_0.5", "ceiling_0.025", "ceiling_0.5", "used", "perplexity", "drift", "h_norm",
           "h_cosine", "h_rank", "z_sd", "skipped", "lr", "beta", "grad_norm", "images_per_s",
           "data_share", "memory_mb"]
# those that stand only in rows of an evaluation, by themselves or behind the name of a further
# prototype set, as student_used and patch_used
MEASURED = COLUMNS[COLUMNS.index("knn"):COLUMNS.index("z_sd") + 1]
OF_FURTHER_SETS = re.compile(
    f"(student|student_average|patch)_({'|'.join(map(re.escape, MEASURED))})|.*place_nats.*")


class Log:
    """OUT/log.csv, a row with the controls and then one for each printed line, and OUT/args.json;
    written by the first process.

    start: the step at which this process goes on. Rows after it are dropped, so that the log of a
    resumed run is, speed and memory aside, that of a run which never stopped. drop_last: drop the
    row of that step too, since the run stopped between two regular rows.
    """

    def __init__(self, args, start, drop_last=False):
        self.path = os.path.join(args.out, "log.csv")
        self.columns, self.rows = list(COLUMNS), []
        if ddp.RANK:
            return
        if start and os.path.exists(self.path):
            self.read_rows(start, drop_last, args.eval_every)
        self.write_all()
        about = vars(args) | {"torch": torch.__version__, "processes": ddp.WORLD}
        path = os.path.join(args.out, "args.json")
        write(path, lambda f: f.write(json.dumps(about, indent=1).encode()))

    def read_rows(self, start, drop_last, eval_every):
        with open(self.path, newline="", **TEXT) as f:
            whole = [line for line in f if line.endswith("\n")]  # a kill can cut a line short
        table = csv.DictReader(whole)
        try:
            rows = list(table)
            steps = [int(row["step"]) for row in rows]
            for row in rows:
                for cell in row.values():
                    float(cell or 0)  # a row that is cut short has None
        except (csv.Error, KeyError, TypeError, ValueError):
            raise ValueError(f"{self.path} is damaged; move it away, and --resume begins a new "
                             "one") from None
        old = list(table.fieldnames or [])
        self.columns = old + [c for c in self.columns if c not in old]
        self.rows = [row for row, step in zip(rows, steps)
                     if step < start or step == start and not drop_last]
        if self.rows and int(self.rows[-1]["step"]) == start and start % eval_every:
            # an evaluation that was there only because the run stopped at this step
            measured = [c for c in self.columns if c in MEASURED or OF_FURTHER_SETS.fullmatch(c)]
            self.rows[-1].update(dict.fromkeys(measured, ""))

    def write_all(self):
        text = io.StringIO()
        table = csv.DictWriter(text, self.columns, restval="")
        table.writeheader()
        table.writerows(self.rows)
        write(self.path, lambda f: f.write(text.getvalue().encode()))

    def row(self, step, values, terms=()):
        """Add a row {column: number or None}. terms: columns that are terms of the loss."""
        values = {k: f"{float(v):.6g}" for k, v in values.items() if v is not None}
        self.rows.append({"step": step} | values)
        new = [c for c in [*terms, *values] if c not in self.columns]
        new = list(dict.fromkeys(new))
        if new:
            place = self.columns.index("loss_over_ln_k") + 1
            of_loss = [c for c in new if c in terms]
            self.columns[place:place] = of_loss
            self.columns += [c for c in new if c not in terms]
            self.write_all()
            return
        with open(self.path, "a", newline="") as f:
            csv.DictWriter(f, self.columns, restval="").writerow(self.rows[-1])

    def first(self, column):
        """A value of row 0, a control of the untrained network; NaN if there is none."""
        if not self.rows or int(self.rows[0]["step"]) != 0:
            return math.nan
        return float(self.rows[0].get(column) or "nan")


def joined(*parts, **more):
    """One dict of several, each {column of log.csv: value}.

    ValueError for a name in two of them, for one that an evaluation fills, and for a part that is
    no dict.
    """
    whole = {}
    for part in (*parts, more):
        if not isinstance(part, dict):
            raise ValueError("a loss returns {name of a term: value}, and step() of a prototype "
                             "set {column of log.csv: number}, {} if it has nothing to report; got "
                             f"a {type(part).__name__}")
        for name in part:
            if name in ("step", "raw_knn", *MEASURED) or OF_FURTHER_SETS.fullmatch(name):
                raise ValueError(f"{name!r} is a column of log.csv that the loop fills: a term of "
                                 "the loss, and what a prototype set reports, need other names")
            if name in whole:
                raise ValueError(f"two values have the name {name!r} in log.csv: a term of the "
                                 "loss, and what a prototype set reports, need names of their own")
        whole |= part
    return whole


def printed(step, total, row, first_term):
    """A row of the log as one printed line; two where it holds an evaluation."""
    text = f"step {step:>{len(str(total))}}/{total}  loss {row['loss']:.3f}"
    if row.get("loss_over_ln_k") is not None:
        text += f" ({first_term} {row['loss_over_ln_k']:.3f} of uniform)"
    text += f"  {row['images_per_s']:.0f} images/s"
    if "used" in row:
        knn = "" if row["knn"] is None else f"k-NN {row['knn']:.1f}  "
        text += f"\n     {knn}{of_set(row)}  |h| {row['h_norm']:.2f}"
    return text


def of_set(row, set_=""):
    """What a row of the log says of a prototype set, as text. set_: what the columns of a further
    one begin with, "patch_" or "student_"."""
    row = {name: row[set_ + name] for name in ("unique_0.025", "unique_0.5", "ceiling_0.5", "used",
                                               "perplexity", "drift")}
    return (f"unique(.025) {share(row['unique_0.025'])}  unique(.5) {share(row['unique_0.5'])} "
            f"(ceiling {row['ceiling_0.5']:.3f})  used {row['used']:.3f}  "
            f"perplexity {row['perplexity']:.3f}  drift {row['drift']:.3f}")


def share(unique):
    """A share of unique prototypes as text; None: of a memory, in which there is none to count."""
    return "memory" if unique is None else f"{unique:.3f}"


class Record:
    """The terms of the loss and the gradient norm of every step since the last row of the log.

    A step with a value that is not finite is skipped on the device (optim.CheckedStep), where its
    values already are the mean over all processes: all of them skip it, and nobody waits. Only
    `read` waits for the device: at every step on a CPU; on a GPU where a row or a checkpoint is due
    anyway.
    """

    def __init__(self, state=None):
        state = state or {"names": [], "rows": []}
        self.names, self.rows, self.sum = state["names"], state["rows"], 0
        self.unread, self.bad_in_a_row, self.first_bad = [], 0, ""

    def add(self, terms, share):
        """The terms {name: scalar} of a micro-batch that is this share of the batch.

        ValueError if they are not those of the step before: each has a column of log.csv.
        """
        names = [*terms, "grad_norm"]
        if self.names and names != self.names:
            raise ValueError(f"the loss has the terms {', '.join(terms)} after a step with "
                             f"{', '.join(self.names[:-1])}: where a term does not count, return "
                             "0 for it, since each has a column of log.csv")
        self.names = names
        device = terms["loss"].device
        # a loss may give the number 0 for a term that does not count
        values = [v.detach() if torch.is_tensor(v) else torch.full((), float(v), device=device)
                  for v in terms.values()]
        self.sum = self.sum + share * torch.stack(values)  # (terms,)

    def take(self):
        """Terms of the step so far (terms,); the next step begins at 0."""
        values, self.sum = self.sum, 0
        return values

    def append(self, step, lr, values):
        """values (terms + 1,): means over the processes of what `take` gave; gradient norm."""
        self.unread.append((step, lr, values))

    def read(self):
        """Name the first of several steps that are not finite; ValueError at the third in a row."""
        if not self.unread:
            return
        rows = torch.stack([values for _, _, values in self.unread]).tolist()  # (steps, terms + 1)
        for (step, lr, _), row in zip(self.unread, rows):
            self.rows.append(row)
            bad = [f"{name} {v}" for name, v in zip(self.names, row) if not math.isfinite(v)]
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            if self.bad_in_a_row == 1:
                self.first_bad = (f"step {step} is not finite: {', '.join(bad)} (lr {lr:.3g}, "
                                  f"gradient norm {row[-1]:.3g})")
                ddp.print0(f"{self.first_bad}; skipped on all processes")
            if self.bad_in_a_row == 3:
                raise ValueError(f"three steps in a row, up to {step}, were skipped; "
                                 f"{self.first_bad}. The last checkpoint is untouched; lower --lr "
                                 "or --logit-scale")
        self.unread = []

    def means(self):
        """{name: mean over the steps that were not skipped}, and "skipped": how many were."""
        good = [row for row in self.rows if all(map(math.isfinite, row))]
        if good:
            means = [sum(column) / len(good) for column in zip(*good)]
        else:
            means = [math.nan] * len(self.names)
        return dict(zip(self.names, means)) | {"skipped": len(self.rows) - len(good)}

    def clear(self):
        self.rows = []

    def state(self):
        return {"names": self.names, "rows": self.rows} if self.rows else {}


class Clock:
    """Speed since the last `restart`, which is at regular rows of the log."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.begin, self.steps, self.waiting = time.perf_counter(), 0, 0.0

    def next(self, batches):
        """The next batch. The time that the loop waits for it is added to `waiting`."""
        begin = time.perf_counter()
        batch = next(batches)
        self.waiting += time.perf_counter() - begin
        self.steps += 1
        return batch

    def speed(self, batch_size):
        """{"images_per_s": images of all processes in a second, "data_share": share of the time in
        which the loop waited for batches}, since the last restart."""
        seconds = time.perf_counter() - self.begin
        return {"images_per_s": self.steps * batch_size / seconds,
                "data_share": self.waiting / seconds}


@dataclass
class Due:
    """What is due after a step."""
    row: bool  # a row of the log
    regular: bool  # one that is due even if the run does not stop here; then the means begin anew
    evaluation: bool
    checkpoint: bool


def due(args, done, stop, total, leaving):
    """What is Due after `done` steps.

    stop, total: last step of this process, and of the run. leaving: the number of a signal, or 0.
    """
    regular = done == total or done % args.log_every == 0 or done % args.eval_every == 0
    evaluation = done == stop or done % args.eval_every == 0
    often = [n for n in (args.save_every, args.keep_every) if n and done % n == 0]
    return Due(regular or evaluation, regular, evaluation, bool(evaluation or leaving or often))


def peak_memory(device):
    """Peak memory so far, MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def keep_freed_memory():
    """Ask glibc to keep freed memory: on a CPU this saves a tenth of the time.

    Otherwise it gives memory back to the kernel and fetches it again, page by page and zeroed, at
    every step. Does nothing on other systems.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another libc
            M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
            libc = ctypes.CDLL(None)
            libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
            libc.mallopt(M_MMAP_THRESHOLD, 2 ** 30)
