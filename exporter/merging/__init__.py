"""How a merge is checked, laid out, written, recorded and resumed; the verb is ``exporter/merge.py``."""
