"""From text to text: tokenizer and chat template, requests, completions and conversations."""
