"""`expertune bench`: the expert MLP with LoRA beside its rivals and dense cuBLAS, in one process and interleaved.

cases.py says what is measured, problem.py draws it, ways.py and its neighbours compute it, measure.py times them,
truth.py checks them against fp32, run.py goes through all cases; results.py and figure.py write the CSV and the plot.
"""
