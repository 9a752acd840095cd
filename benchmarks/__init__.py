"""Benchmarks: `python -m benchmarks [NAME ...]`. A file bench_NAME.py lists cases; the other files measure, keep and show them."""
