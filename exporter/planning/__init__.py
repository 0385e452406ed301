"""Footprints of every format, and which one to recommend; the verb is exporter/plan.py."""
