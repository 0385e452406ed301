"""What a verb is given, before weights are loaded: an artifact, a plain model, or a base model with adapters."""
