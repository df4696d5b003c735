"""What a start does without: modules that are imported later, or never."""

import subprocess
import sys

import pytest

COMPILER = ("torch._dynamo", "torch._inductor")
AS_ON_A_GPU = "import torch; torch.cuda.is_available = lambda: True;"


def imported_by(code: str) -> set[str]:
    """The modules that a process has after `code`."""
    ask = f"import sys; {code}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split())


OPTIMIZER = (
    "import torch; from recipe.megatron.adam import MasterAdam;"
    "one = MasterAdam([torch.zeros(3)], lr=1.0, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0);"
    "one.allocate(); one.begin()"
)


@pytest.mark.parametrize(
    "code", [f"import recipe.megatron.rank; {OPTIMIZER}", f"{AS_ON_A_GPU} import recipe.megatron.rank"]
)
def test_a_rank_is_imported_and_its_optimizer_built_without_what_its_start_does_not_need(code: str) -> None:
    modules = imported_by(code)
    assert "megatron.core.models.gpt.gpt_model" in modules
    assert not modules & {*COMPILER, "tensorboard", "transformers", "matplotlib", "pandas"}


def test_the_embedded_engine_is_imported_without_what_it_computes_itself() -> None:
    modules = imported_by("import recipe.engines.embedded.__main__")
    assert "torch" in modules
    assert not modules & {*COMPILER, "transformers", "ray"}


def test_a_compiled_function_is_compiled_when_it_is_called() -> None:
    code = (
        "import torch; compiled = []; torch.compile = lambda function: compiled.append(function) or function;"
        "from recipe.megatron.fusion import compiled_when_called; double = compiled_when_called(lambda x: 2 * x);"
        "assert not compiled; assert [double(2), double(3)] == [4, 6]; assert len(compiled) == 1"
    )
    assert "torch" in imported_by(code)


def test_the_driver_starts_ray_before_it_imports_what_comes_later() -> None:
    modules = imported_by("import recipe.train")
    assert "ray" in modules
    assert not modules & {"torch", "transformers", "matplotlib", "tensorboard", "megatron"}
