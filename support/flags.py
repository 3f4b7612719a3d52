"""What the flags of a command may be: its numbers by a table of ranges, and the files it writes."""
import argparse
import os
import re

# The largest number that any flag takes. Its square fits into float32, and a million times it into
# int64.
MOST = 2 ** 32 - 1


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults stand in --help, but for None: there the text says what it means."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def check_values(flags, ranges):
    """ValueError, a sentence with flag and value, for a flag that cannot be.

    flags: what argparse returned. ranges: [(what a value must be, test, names of flags)]; every
    number of a flag has to pass the test, and None passes. nan passes no comparison. Whatever the
    table says, no number lies beyond MOST, and no text is empty.
    """
    def refuse(name, must):
        given = " ".join(map(str, values_of(flags, name)))
        raise ValueError(f"--{name.replace('_', '-')} must {must}, got {given or 'an empty text'}")

    for must, test, names in ranges:
        for name in names:
            if not all(map(test, values_of(flags, name))):
                refuse(name, must)
    for name in vars(flags):
        for value in values_of(flags, name):
            if isinstance(value, (int, float)) and not -MOST <= value <= MOST:
                refuse(name, f"be a number below {MOST + 1} in size")
            if value == "":
                refuse(name, "not be empty")


def values_of(flags, name):
    """The values of a flag: one, several or, where it was not given, none."""
    value = getattr(flags, name)
    if value is None:
        return []
    return value if isinstance(value, (list, tuple)) else [value]


def check_files(flags, *names, inputs=()):
    """ValueError for flags that name no file which may be written: it lies in a folder that exists,
    is a file itself if it exists, is neither one of the inputs nor what a run of ours keeps, and is
    not named twice."""
    read, written = {os.path.realpath(path) for path in inputs}, set()
    for name in names:
        for path in values_of(flags, name):
            folder = os.path.dirname(os.path.abspath(path))
            if not os.path.isdir(folder) or os.path.exists(path) and not os.path.isfile(path):
                raise ValueError(f"--{name.replace('_', '-')} {path} must be a file in a folder "
                                 "that exists")
            of_run = re.fullmatch(r"ckpt.*\.pt|args\.json|log\.csv|lock", os.path.basename(path))
            if os.path.exists(path) and (of_run or os.path.realpath(path) in read):
                raise ValueError(f"--{name.replace('_', '-')} {path} would overwrite a file that "
                                 "is read, or that a run keeps; name another one")
            if os.path.realpath(path) in written:
                raise ValueError(f"--{name.replace('_', '-')} {path} would overwrite the file of "
                                 "another flag; name another one")
            written.add(os.path.realpath(path))
