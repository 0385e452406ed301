"""The weights that artifacts are made from and models are run with: base models, adapters, and their exact sum."""
