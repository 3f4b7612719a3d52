"""Studies: python -m lab.NAME, with NAME ablate, bench, chaos, eval_dense, fuzz, gpu, hosts or
products."""
