"""Studies of the models: what they cost, how they scale, where else they run.

`scaling` fits laws to finished runs and imports no trainer; `sweep` makes the runs; `bench`
measures speed and memory; `accelerator` is the paper's hardware. configs/ and notebooks/ use
them, results/ holds what was measured, cli/ the subcommands.
"""
