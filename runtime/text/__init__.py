"""From texts to token ids and back: chat templates, completions, conversations."""
