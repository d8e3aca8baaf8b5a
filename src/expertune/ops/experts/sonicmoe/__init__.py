"""The expert MLP on Hopper's kernels (`scattermoe.hopper`), its adapter in their accumulator or folded into W."""
