"""How a merge is laid out, computed, written, proven and gone on from; the verb is exporter/merge.py."""
