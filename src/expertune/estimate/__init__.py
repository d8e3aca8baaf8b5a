"""What `expertune estimate` computes: the memory of a training step on each GPU, and the layout that fits.

A step is run on tensors that have shapes and no data (torch's fake tensors), every allocation of it is written into a
ledger, and the ledger's peak is the estimate; nothing is loaded, and no GPU is needed.
"""
