"""The paper's accelerator: fixed-point numerics, instruction set, simulator and RTL.

Everything here runs on a CPU; nothing has run on a board. See docs/hardware.md.
"""
