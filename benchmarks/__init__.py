"""Benchmarks: `python -m benchmarks [NAME ...]`. A file bench_NAME.py lists cases; the other files measure, keep and show them."""

from flowkernels.layers import masked_autoregressive

masked_autoregressive.INITIAL_OUTPUTS = 1.0  # errors are to show as after training, and a new layer is near the identity
