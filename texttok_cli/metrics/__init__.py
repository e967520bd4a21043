"""Metrics by the field's protocols.

from texttok_cli.metrics.evaluator import Evaluator, Work
from texttok_cli.metrics.sources import FileImages

evaluator = Evaluator(["fid", "precision", "recall"])
for batch in Work(FileImages(samples), FileImages(references, crop_to=256), paired=False).batches(64):
    evaluator.update(batch)
evaluator.compute()                       # {"fid": (12.3, None), ...}: value, and its spread where the rule has one
"""
