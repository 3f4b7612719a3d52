"""What the scripts of zoo/ make of the command line of train.py."""
import math

import config
from support import ddp


def narrow(parser, presets, choices, helps=None):
    """Make of the command line of train.py that of a script of zoo/ with fewer choices.

    presets: its own; of those of train.py only "tiny" stays, as argparse would take the method of
    another one unchecked. choices: {flag: what it can be}; a single one is the default. helps:
    {flag: help text}.
    """
    for name in [*parser.presets]:
        if name != "tiny":
            del parser.presets[name]
    parser.presets.update(presets)
    for action in parser._actions:
        action.choices = choices.get(action.dest, action.choices)
        if len(choices.get(action.dest, ())) == 1:
            action.default, = action.choices
            action.help = f"the {action.dest} of this script; there is no choice"
        action.help = (helps or {}).get(action.dest, action.help)


def check_not_read(args, add_flags, names, script):
    """ValueError for a flag among `names` that is not at its default, as the script does not read
    it; script: its name, and perhaps why. Defaults depend on the prototype set: those of this run's
    count."""
    default = config.completed({"prototypes": args.prototypes}, add_flags)
    for name in names:
        value = getattr(args, name)
        if value != getattr(default, name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect in {script}; got {value}")


def warn_of_flat_targets(flag, K, vectors):
    """Say so where Sinkhorn-Knopp shares about so many vectors of a step among K prototypes, and K
    is much larger: the target of a vector is then spread over many of them."""
    if vectors and K > 4 * vectors:
        ddp.print0(f"warning: Sinkhorn-Knopp shares about {vectors:.0f} patches among --{flag} {K},"
                   f" so the entropy of a target is about {math.log(K / vectors):.1f} nats or more;"
                   f" at most {4 * vectors:.0f} prototypes are better")
