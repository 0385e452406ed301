"""Answering several users at once: the engine that decodes in a thread of its own."""
