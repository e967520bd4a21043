"""Measurements of speed: timing, the paper's latency table, speed/quality curves, and reports of them."""
