"""A GGUF file as llama.cpp reads it: its keys, its tensors and its tokenizer."""
