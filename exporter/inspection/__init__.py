"""Facts about adapters, bases and artifacts, and a guess of an adapter's positions; the verb is exporter/inspect.py."""
