"""The format GGUF of llama.cpp: one file with weights, tokenizer and settings, and a Modelfile for Ollama."""
