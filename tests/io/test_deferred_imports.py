"""What a run imports: nothing that it doesn't use; and what is deferred is what it would have been, once it is used.

Each test has a process of its own, that starts with nothing imported.
"""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.helpers import ROOT

UNUSED = (
    "bitsandbytes",
    "bokeh",
    "peft",
    "prodigyopt",
    "sympy",
    "tensorboardX",
    "torchao",
    "torch.distributed.tensor",
    "wandb",
)
FIRST = """
    import sys
    from lora_utils.io.libraries import import_libraries
    import_libraries()
    import torch
"""


def output_of(code: str, **variables: str) -> list[str]:
    """Run code in a process of its own. -> the lines that it prints"""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_training_and_a_prediction_import_nothing_that_they_do_not_use(tiny_model):
    lines = output_of(
        f"""
        import sys, tempfile
        from pathlib import Path
        from examples import demo
        from predict import Predictor
        from train import train
        folder = Path(tempfile.mkdtemp())
        demo.write_dataset(folder / "d.zip", demo.OBJECT, demo.shapes.Prompt(demo.TOKEN))
        trained = demo.call(train, dataset=folder / "d.zip", **{{**demo.TRAINING, "steps": 1}})
        predictor = Predictor()
        predictor.setup()
        demo.call(predictor.predict, prompt=demo.TOKEN, replicate_weights=trained.weights, **demo.SAMPLING)
        print("imported", *(name for name in {UNUSED!r} if name in sys.modules))
        print("compiler", type(sys.modules["torch._dynamo"]).__name__)
        """,
        BASE_MODEL=str(tiny_model),
    )
    assert lines[-2:] == ["imported", "compiler _DeferredCompiler"]


@pytest.mark.parametrize(
    "used", [pytest.param("import torch._dynamo.config", marks=pytest.mark.slow), "torch.compile(len)"]
)
def test_the_compiler_is_imported_when_it_is_used_and_every_part_of_it_once(used):
    lines = output_of(
        FIRST
        + f"""
    print(type(torch._dynamo).__name__)
    {used}
    import torch._dynamo.config, torch._dynamo.exc
    print(type(torch._dynamo).__name__)
    print(torch._dynamo.config is sys.modules["torch._dynamo.config"], torch._dynamo is sys.modules["torch._dynamo"])
    print(torch._dynamo.exc.Unsupported is sys.modules["torch._dynamo.symbolic_convert"].Unsupported)
    """
    )
    assert lines == ["_DeferredCompiler", "module", "True True", "True"]


@pytest.mark.slow
def test_what_was_marked_before_the_compiler_was_imported_is_left_alone_by_it():
    lines = output_of(
        FIRST
        + """
    @torch.compiler.disable
    def apart(x):
        return x + 1

    print(int(apart(torch.zeros(()))), type(torch._dynamo).__name__)
    explained = torch._dynamo.explain(lambda x: apart(x * 2) * 3)(torch.ones(2))
    print(explained.graph_count, explained.graph_break_count)
    """
    )
    assert lines == ["1 _DeferredCompiler", "2 1"]


@pytest.mark.slow
def test_a_deferred_package_has_all_that_it_has():
    lines = output_of(
        FIRST
        + """
    import diffusers.models.transformers as models, transformers
    print(hasattr(models, "no_such_name"))
    print(models.FluxTransformer2DModel.__name__, transformers.models.bert.BertConfig.__name__)
    from diffusers import QwenImagePipeline
    import bitsandbytes, peft, torchao
    print(QwenImagePipeline.__name__)
    """
    )
    assert lines == ["False", "FluxTransformer2DModel BertConfig", "QwenImagePipeline"]


@pytest.mark.slow
def test_a_second_thread_waits_until_a_package_is_executed():
    lines = output_of(
        FIRST
        + """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: torch._dynamo.config.recompile_limit, range(8)))
    print(len(set(found)), type(torch._dynamo).__name__)
    """
    )
    assert lines == ["1 module"]


TRAININGS = {
    "bitsandbytes": "--optimizer adamw8bit --quantization nf4 --ema_decay 0.9",
    "prodigy, floats of torchao": "--optimizer prodigy --quantization fp8 --lora_targets attention_mlp --adapter dora",
    "adafactor, integers of torchao": "--optimizer adafactor --quantization int8 --autocaption --flip insist",
    "previews and a folder of a run": "--train_placeholder_token --save_every 1 --sample_prompts <zwx>",
}


@pytest.mark.slow
@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS)
def test_what_is_imported_late_is_there_when_a_command_needs_it(options, archive, tiny_model, tmp_path):
    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, "BASE_MODEL": str(tiny_model)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    weights, converted = tmp_path / "weights.zip", tmp_path / "lora"
    train = ["train", str(archive), "--steps", "2", "--rank", "2", "--resolution", "64"]
    run_dir = ["--run_dir", str(tmp_path / "run")] if "save_every" in options else []
    sample = ["sample", "--prompt", "a red circle", "--width", "64", "--height", "64", "--steps", "6", "--go_fast"]
    assert run("lora_utils", *train, *options.split(), *run_dir, "--output", str(weights)) == ""
    assert run("lora_utils.convert", str(weights), str(converted), "--to", "peft") == ""
    assert run("lora_utils", *sample, "--replicate_weights", str(weights), "--output", str(tmp_path / "images")) == ""
