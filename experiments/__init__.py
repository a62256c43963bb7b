"""Studies of the models: many runs (`sweep`) and what they say (`scaling`, which imports no
trainer), the paper's hardware (`accelerator`), speed and memory (`bench`); notebooks and records.
"""
