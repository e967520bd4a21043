"""Captions for images that have none: captioners behind one protocol, and unseen captions for every class."""
