"""Importing expertune is cheap, registers whatever comes first, and can be undone."""

import subprocess
import sys

import pytest

import expertune

PROGRAMS = {
    "import is cheap": """
import sys, expertune
heavy = {"torch", "transformers", "peft", "trl", "datasets"} & set(sys.modules)
assert not heavy, heavy
""",
    "expertune first": """
import expertune
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from peft.tuners.lora.layer import ParamWrapper
assert {"expertune", "torch_grouped"} <= set(ALL_EXPERTS_FUNCTIONS.valid_keys())
assert hasattr(ParamWrapper._activate_lora, "expertune_original")
""",
    "expertune last": """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from peft.tuners.lora.layer import ParamWrapper
import expertune
assert {"expertune", "torch_grouped"} <= set(ALL_EXPERTS_FUNCTIONS.valid_keys())
assert hasattr(ParamWrapper._activate_lora, "expertune_original")
""",
    "unregistered before PEFT is there": """
import expertune
expertune.unregister()
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from peft.tuners.lora.layer import ParamWrapper
assert "expertune" not in ALL_EXPERTS_FUNCTIONS.valid_keys()
assert not hasattr(ParamWrapper._activate_lora, "expertune_original")
""",
    "peft never": """
import sys, expertune
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "expertune" in ALL_EXPERTS_FUNCTIONS.valid_keys()
assert "peft" not in sys.modules
""",
    "modules keep their own loader": """
import sys, expertune
before = list(sys.meta_path)
import transformers.integrations.moe as moe, peft.tuners.lora.layer as layer
for module in (moe, layer):
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader", module.__spec__
assert not [finder for finder in sys.meta_path if "expertune" in type(finder).__module__]
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_a_fresh_process(name: str) -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAMS[name]], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_registering_again_changes_nothing_and_unregistering_undoes_it() -> None:
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    hooked = ParamWrapper._activate_lora
    expertune.register()
    assert ParamWrapper._activate_lora is hooked
    expertune.unregister()
    try:
        assert ParamWrapper._activate_lora is hooked.expertune_original
        assert "expertune" not in ALL_EXPERTS_FUNCTIONS.valid_keys()
        assert {"eager", "grouped_mm"} & set(ALL_EXPERTS_FUNCTIONS.valid_keys())
        expertune.unregister()
    finally:
        expertune.register()
    assert "expertune" in ALL_EXPERTS_FUNCTIONS.valid_keys()
