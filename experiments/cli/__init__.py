"""Subcommands of `mmfree`: bench, fit, crossing, isoflop, predict, sweep and hardware."""
