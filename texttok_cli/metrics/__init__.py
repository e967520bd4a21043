"""Metrics by the field's protocols."""
