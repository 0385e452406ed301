"""The tensors of a result: how each is computed from base and adapters, rounded, and measured."""
