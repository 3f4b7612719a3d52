"""Studies: python -m lab.ablate, lab.bench, lab.chaos."""
