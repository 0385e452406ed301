"""The directory that is written: staging, ``config.json``, tokenizer files, and the closing check."""
