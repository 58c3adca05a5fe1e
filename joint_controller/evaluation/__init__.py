"""Evaluation: the VQA accuracy, baselines and the sweep over budgets."""
