"""The expert MLP with LoRA, once per way of computing it; `reference.py` is the oracle of them all."""
