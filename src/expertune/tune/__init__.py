"""`expertune tune`: which tile is fastest for a shape on this machine's GPU, measured once and kept in a file.

shapes.py reads a model's sizes, measure.py times the candidates of one case, run.py goes through all cases, cache.py
keeps the winners; `expertune.integrations.tuned` looks them up in training.
"""
