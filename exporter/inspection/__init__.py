"""What can be said of adapters, bases and artifacts without running them; the verb is exporter/inspect.py."""
