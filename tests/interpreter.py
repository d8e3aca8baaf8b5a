"""Triton's interpreter, as far as the tests need it to be other than it is."""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any


def let_loops_have_bounds() -> None:
    """Triton 3.6 makes a loop's bound an int in a way that NumPy takes no more; here as Triton 3.9 does it."""
    if find_spec("triton") is None or not version("triton").startswith("3.6"):
        return
    from triton.runtime import interpreter

    patch_tensors: Any = interpreter._patch_lang_tensor

    def patch_bounds_too(tensor: Any, scope: Any) -> None:
        patch_tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_bounds_too
