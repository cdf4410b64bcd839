"""python run_verl.py JOB.json: verl's own SFT trainer, one rank; on a CPU over the least that its engine needs there.

Option: checkpointing. The platform plug-in below is for this comparison only; it is not the recipe's own.
"""

import contextlib
import os
import shutil
import socket
import sys

import psutil
import stopwatch
import torch
from job import attention, read_job

job = read_job()
with socket.socket() as server:
    server.bind(("localhost", 0))
    port = server.getsockname()[1]
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))


def register_cpu():
    """Before anything of verl's engine is imported."""
    os.environ["VERL_PLATFORM"] = "cpu"
    from verl.plugin.platform import PlatformBase, PlatformRegistry

    def resident_bytes(*_):
        return psutil.Process().memory_info().rss

    class Module:
        """torch.cpu with the names of torch.cuda that verl calls."""

        max_memory_allocated = max_memory_reserved = memory_allocated = memory_reserved = staticmethod(resident_bytes)
        get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
        set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))
        current_device = staticmethod(lambda: torch.device("cpu"))
        get_device_name = staticmethod(lambda *_: "cpu")
        device_count = staticmethod(lambda: 1)
        is_available = staticmethod(lambda: True)
        mem_get_info = staticmethod(lambda *_: (psutil.virtual_memory().available, psutil.virtual_memory().total))
        synchronize = empty_cache = set_device = reset_peak_memory_stats = staticmethod(lambda *_: None)

        def __getattr__(self, name):
            return getattr(torch.cpu, name)

    def constant(value):
        return lambda self, *_, **__: value

    values = dict(
        is_available=True,
        is_platform_available=True,
        device_count=1,
        current_device=torch.device("cpu"),
        get_device_capability=(None, None),
        communication_backend_name="gloo",
        visible_devices_envvar="SFT_CPU_RANKS",
        ray_resource_name="CPU",
        ray_noset_envvars=[],
        is_ipc_supported=False,
    )
    nothing = ("set_device", "synchronize", "set_allocator_settings", "empty_cache", "cudart")
    nothing += ("profiler_start", "profiler_stop")
    facts = {name: constant(value) for name, value in values.items()} | {name: constant(None) for name in nothing}
    facts |= {name: lambda self, seed: torch.manual_seed(seed) for name in ("manual_seed", "manual_seed_all")}
    facts["nvtx_range"] = lambda self, message: contextlib.nullcontext()
    facts |= {"device_name": "cpu", "vendor_name": "cpu", "device_module": Module()}
    PlatformRegistry.register(platform="cpu")(type("Platform", (PlatformBase,), facts))
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    register = EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
    register(type("Engine", (FSDPEngineWithLMHead,), {}))


def join(timeout_second=0, **_):
    torch.distributed.init_process_group("gloo")
    return 0, 0, 1


cpu = job.device == "cpu"
if cpu:
    register_cpu()
    import verl.utils.distributed

    verl.utils.distributed.initialize_global_process_group = join
import verl.trainer.sft_trainer as trainer  # noqa: E402

train_batch = trainer.TrainingWorker.train_batch


def watched(self, data):
    for ids, mask in zip(data["input_ids"].unbind(), data["loss_mask"].unbind(), strict=True):
        stopwatch.saw(ids[None], torch.where(mask.bool(), ids, -100)[None])
    return train_batch(self, data)


trainer.TrainingWorker.train_batch = watched
if not job.save:
    trainer.CheckpointHandler.save_checkpoint = lambda self, step: None
sys.argv = [
    "sft_trainer",
    f"trainer.device={job.device}",
    f"data.train_files={job.parquet}",
    "data.val_files=null",
    f"data.train_batch_size={job.batch_size}",
    f"data.max_length={job.max_length}",
    "data.truncation=right",
    "data.num_workers=0",
    f"data.max_token_len_per_gpu={job.micro_tokens}",
    f"model.path={job.model}",
    f"+model.override_config.attn_implementation={attention(job)}",
    f"model.enable_gradient_checkpointing={not cpu}",
    "model.use_remove_padding=true",
    f"optim.lr={job.lr}",
    f"optim.weight_decay={job.weight_decay}",
    f"optim.clip_grad={job.clip}",
    "optim.lr_scheduler_type=constant",
    "trainer.logger=[console]",
    "trainer.total_epochs=1",
    f"trainer.total_training_steps={job.steps}",
    f"trainer.default_local_dir={job.out}/checkpoints",
    f"trainer.seed={job.seed}",
    "trainer.resume_mode=disable",
    f"engine.use_torch_compile={not cpu}",
    "engine.strategy=fsdp2",
    f"engine.seed={job.seed}",
    "checkpoint.save_contents=[model,hf_model]",
    f"hydra.run.dir={job.out}/hydra",
]
if job.compute == "fp32":
    sys.argv.append("+engine.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}")
if job.weights == "bf16":
    sys.argv.append("engine.model_dtype=bf16")
if job.lora:
    adapters = {"lora_rank": job.lora.rank, "lora_alpha": job.lora.alpha, "target_modules": "all-linear"}
    sys.argv += [f"model.{key}={value}" for key, value in adapters.items()]
trainer.main()
if job.save:
    step = f"{job.out}/checkpoints/global_step_{job.steps}"
    shutil.move(f"{step}/huggingface", job.save)
    if job.lora:
        shutil.copy(f"{step}/lora_train_meta.json", job.save)
