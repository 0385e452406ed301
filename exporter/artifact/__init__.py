"""The directory that is written: staging, configuration, tokenizer files, and the closing check."""
