"""The study at 20 tokens a parameter and beyond: its corpus, its holds of a machine, its analysis.

docs/scaling-study-plan.md is the plan. Scripts, run as `python -m mmfree_jax.experiments.study.X`.
"""
