"""Fused Triton kernels for experts with LoRA (ScatterMoE-style: rows are gathered in the load, never copied)."""
