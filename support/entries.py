"""Entries of the tables LOSSES (losses.py) and PROTOTYPES (heads.py)."""
import importlib


def class_of(entry):
    """The class that an entry is, or that it names as "module.Class": this one is loaded now."""
    if not isinstance(entry, str):
        return entry
    module, name = entry.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)
