"""Entries of the tables LOSSES (losses.py), PROTOTYPES (heads.py) and SETS (data.py)."""
import importlib


def loaded(entry):
    """The class or function that an entry is, or that it names as "module.name": then it is loaded
    now."""
    if not isinstance(entry, str):
        return entry
    module, name = entry.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)
