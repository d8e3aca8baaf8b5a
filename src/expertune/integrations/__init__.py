"""Where expertune meets Transformers and PEFT: experts implementations, adapters passed unfolded, targets."""
