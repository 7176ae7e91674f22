"""Experiments: the paper's findings with seeds and error bars (reproduce), and timings (bench)."""
