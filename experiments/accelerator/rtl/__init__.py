"""The accelerator in Amaranth (the extra `hardware`): units, core, Verilog, and its simulation."""
