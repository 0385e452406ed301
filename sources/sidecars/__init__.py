"""Files next to the weights: tokenizer, chat template, generation settings, and the code of torch artifacts."""
