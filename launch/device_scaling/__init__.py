"""How training speed scales with the number of GPUs of one host."""
