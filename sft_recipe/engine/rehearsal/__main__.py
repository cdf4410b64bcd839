"""python -m sft_recipe.engine.rehearsal GUARD: reads a case per line, runs it in a child process, writes a line."""

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from sft_recipe.engine.rehearsal.guard import load
from sft_recipe.errors import silence_libraries


def main(library: Path) -> None:
    """Serve cases from standard input until it ends; what they print goes to standard error."""
    load(library)
    silence_libraries()
    from sft_recipe.engine.rehearsal import step
    from sft_recipe.engine.rehearsal.device import FakeGpu

    _import_libraries()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        given: dict[str, Any] = json.loads(line)
        gpu = given.pop("gpu")
        case = step.Case(**given, gpu=FakeGpu(gpu["name"], gpu["memory"], tuple(gpu["capability"])))
        answers.write(json.dumps(_in_child(lambda case=case: step.as_json(step.rehearse(case)))) + "\n")
        answers.flush()


def _import_libraries() -> None:
    """What every case needs; verl looks for a device when it is imported, and bitsandbytes for its libraries."""
    from sft_recipe.engine.rehearsal import device, memory

    import_module("peft")  # imports bitsandbytes, which then finds no GPU
    device.install(device.FakeGpu(), 1, memory.DeviceMemory())
    for module in ("torch._dynamo", "transformers.models.llama.modeling_llama", "verl.workers.engine_workers"):
        import_module(module)
    for name in ("engine.seq2seq_engine", "engine.verl_config", "models.memory_estimate", "models.stats"):
        import_module(f"sft_recipe.{name}")


def _in_child(act: Any) -> dict[str, Any]:
    """Return what `act` returns in a child process, or {"error": ...}."""
    answer: Any
    receiving, sending = os.pipe()
    child = os.fork()
    if child:
        os.close(sending)
        with open(receiving) as file:
            answer = file.read()
        os.waitpid(child, 0)
        return json.loads(answer or '{"error": "the process of the rehearsal ended without an answer"}')
    os.close(receiving)
    try:
        answer = act()
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    with open(sending, "w") as file:
        json.dump(answer, file)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
