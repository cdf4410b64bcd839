"""The Chinese texts of the checks, by their English originals."""

NAMES = {
    "bad records": "错误记录",
    "chat template": "对话模板",
    "data": "数据",
    "data notice": "数据提示",
    "device": "设备",
    "disk": "磁盘",
    "duplicates": "重复",
    "empty values": "空值",
    "interconnect": "GPU 互联",
    "length of examples": "样本长度",
    "length of texts": "文本长度",
    "license": "许可证",
    "limits": "系统限制",
    "loggers": "日志记录",
    "measured": "实测",
    "memory": "内存",
    "model": "模型",
    "network": "网络",
    "output folder": "输出目录",
    "packages": "软件包",
    "run folder": "运行目录",
    "settings": "配置",
    "shared memory": "共享内存",
    "steps": "步数",
    "validation": "验证",
    "warm-up": "预热",
    "weights": "权重",
}
CHINESE = {
    "no GPU: {ranks:# rank} on the CPU, {cores:# core}, {memory:.1f} GiB of memory": (
        "没有 GPU：CPU 上 {ranks} 个进程，{cores} 核，内存 {memory:.1f} GiB"
    ),
    "{count} x {name}, {memory:.1f} GiB, compute capability {major}.{minor}; driver {driver}, CUDA {cuda}": (
        "{count} 块 {name}，显存 {memory:.1f} GiB，计算能力 {major}.{minor}；驱动 {driver}，CUDA {cuda}"
    ),
    "{count} x {name}, {memory:.1f} GiB, {architecture}; ROCm {version}": (
        "{count} 块 {name}，显存 {memory:.1f} GiB，{architecture}；ROCm {version}"
    ),
    "this Mac's GPU (MPS) is not supported: {ranks:# rank} on its CPU, {cores:# core}, {memory:.1f} GiB": (
        "不支持这台 Mac 的 GPU（MPS）：CPU 上 {ranks} 个进程，{cores} 核，内存 {memory:.1f} GiB"
    ),
    "GPUs read each other's memory directly": "GPU 之间可以直接读取显存",
    "GPUs cannot read each other's memory: collectives go through the host, which is slower": (
        "GPU 之间不能直接读取显存：集合通信要经过主机，速度较慢"
    ),
    "exchange less often: a larger --micro_batch_size, fsdp.reshard_after_forward=false if memory allows": (
        "减少通信次数：增大 --micro_batch_size；显存允许时设 fsdp.reshard_after_forward=false"
    ),
    "/dev/shm has {size:.1f} GiB": "/dev/shm 有 {size:.1f} GiB",
    "/dev/shm has {size:.2f} GiB, too little for the ranks of this machine to communicate": (
        "/dev/shm 只有 {size:.2f} GiB，不够本机各进程通信"
    ),
    "start the container with --ipc=host or --shm-size=8g": "启动容器时加 --ipc=host 或 --shm-size=8g",
    "up to {limit} open files": "最多可打开 {limit} 个文件",
    "only {limit} open files are allowed": "只允许打开 {limit} 个文件",
    "{folder} cannot be written: {error}": "{folder} 无法写入：{error}",
    "--output_dir ANOTHER_FOLDER": "--output_dir 换一个目录",
    "{folder}: {free} free, {speed:.0f} MB/s written": "{folder}：剩余 {free}，写入 {speed:.0f} MB/s",
    "{folder}: {free} free, {speed:.0f} MB/s written, which is slow: below {limit:.0f} MB/s": (
        "{folder}：剩余 {free}，写入 {speed:.0f} MB/s，低于 {limit:.0f} MB/s，较慢"
    ),
    "save less often (trainer.save_freq), or use a local disk": "降低保存频率（trainer.save_freq），或使用本地磁盘",
    "{variable} is not set; the interfaces here are {names}": "{variable} 未设置；本机网络接口有 {names}",
    "{variable}={chosen} names no interface that is up; here are {names}": (
        "{variable}={chosen} 不是已启用的网络接口；本机有 {names}"
    ),
    "{total:# record} in {files:# file} ({kinds})": "{files} 个文件（{kinds}）中有 {total:,} 条记录",
    "empty or null fields: {names}": "空字段或 null：{names}",
    "{low:,} to {high:# character}, median {middle:,}": "{low:,} 到 {high:,} 个字符，中位数 {middle:,}",
    "{bad:,} of {total:# record} cannot be used; the first: {first}": (
        "{total:,} 条记录中有 {bad:,} 条无法使用；第一条：{first}"
    ),
    "scripts/preview_data.py --html FILE lists reasons": "scripts/preview_data.py --html 文件 会列出原因",
    "scripts/preview_data.py shows the data": "用 scripts/preview_data.py 查看数据",
    "correct them ({reasons}), or data.on_bad_record=skip": "修正它们（{reasons}），或设 data.on_bad_record=skip",
    "correct them ({reasons}), or data.on_bad_record=skip with a data.max_bad_ratio above {allowed:g}": (
        "修正它们（{reasons}），或设 data.on_bad_record=skip，且 data.max_bad_ratio 大于 {allowed:g}"
    ),
    "{examples:# example}, {tokens:# token}, {share:.0f}% supervised; median {middle:,}, p95 {p95:,}, longest "
    "{longest:,} of {limits}": (
        "{examples:,} 个样本，{tokens:,} 个 token，{share:.0f}% 计算损失；中位数 {middle:,}，p95 {p95:,}，最长 "
        "{longest:,}，上限为 {limits}"
    ),
    "{count:# exact duplicate}": "{count:,} 个完全重复的样本",
    "scripts/prepare_sft_data.py drops exact duplicates": "scripts/prepare_sft_data.py 会去掉完全重复的样本",
    "there is no validation data": "没有验证数据",
    "--val_data FILE, or data.val_ratio=0.05": "--val_data 文件，或 data.val_ratio=0.05",
    "{name}: {shared:,} of {count:# example} {shared:is|are} also trained on, so its loss looks too good": (
        "{name}：{count:,} 个样本中有 {shared:,} 个也用于训练，验证损失会偏低"
    ),
    "data.val_ratio=0.05 splits without overlap": "data.val_ratio=0.05 可以无重叠地划分",
    "{name}: {count:# example}, none of them trained on": "{name}：{count:,} 个样本，都不用于训练",
    "--model NAME_OR_FOLDER": "--model 名称或目录",
    "{name}: {files:# weight file}, {size}, {parameters:,} parameters": (
        "{name}：{files} 个权重文件，{size}，{parameters:,} 个参数"
    ),
    "the files hold {stored:,} numbers, but the model has {base:,}: weights are missing": (
        "文件中有 {stored:,} 个数，而模型有 {base:,} 个：缺少权重"
    ),
    "get the complete model": "获取完整的模型",
    "license file: {found}": "许可证文件：{found}",
    "not needed; targets end with {end}": "不需要；目标以 {end} 结束",
    "supported; assistant turns end with {end}": "支持；助手回合以 {end} 结束",
    "assistant turns end with {end}, which is no special token: the model may not stop": (
        "助手回合以 {end} 结束，它不是特殊 token：模型可能不会停止"
    ),
    "model.chat_template=FILE with a template that ends turns": "model.chat_template=文件，使用会结束回合的模板",
    "{steps:# step} ({per_epoch:,} an epoch) of {batch:# example}, {trained:,} tokens in all": (
        "{steps:,} 步（每轮 {per_epoch:,} 步），每步 {batch} 个样本，共 {trained:,} 个 token"
    ),
    "{left:,} of {steps:# step} left ({per_epoch:,} an epoch) of {batch:# example}, {trained:,} tokens": (
        "{steps:,} 步（每轮 {per_epoch:,} 步）中剩余 {left:,} 步，每步 {batch} 个样本，共 {trained:,} 个 token"
    ),
    "more epochs (--epochs), or a smaller --batch_size": "增加轮数（--epochs），或减小 --batch_size",
    "a larger trainer.total_training_steps": "增大 trainer.total_training_steps",
    "settings that differ from those of the run so far: {changed}": "这些设置与训练至今所用的不同：{changed}",
    "the run continues {checkpoint}": "训练从 {checkpoint} 继续",
    "{warmup:# step} of {steps:,}: the learning rate only rises": "{steps:,} 步中的 {warmup:,} 步：学习率一直上升",
    "--warmup_ratio 0.1 (onecycle: optim.pct_start=0.3) without optim.lr_warmup_steps, or more epochs": (
        "--warmup_ratio 0.1（onecycle：optim.pct_start=0.3），不设 optim.lr_warmup_steps，或增加轮数"
    ),
    "no estimate: the model's dimensions are unknown, or Megatron shards it": (
        "没有估计：模型尺寸未知，或由 Megatron 切分"
    ),
    "a rank needs about {needed:.1f} of {device:.1f} GiB ({parts}), in {dtype}, gradient checkpointing {state}": (
        "每个进程约需 {needed:.1f} GiB，共有 {device:.1f} GiB（{parts}），用 {dtype} 计算，梯度检查点 {state}"
    ),
    "what would fit: {options}": "可行的设置：{options}",
    "no setting here fits: a smaller model, or more memory": "没有可行的设置：换更小的模型，或增加内存",
    "up to {kept:# checkpoint} more at a time, of {each}: {needed} are needed": (
        "最多同时再保留 {kept} 个检查点，每个 {each}，共需 {needed}"
    ),
    "up to {kept:# checkpoint} more at a time, of {each}: {needed} are needed, {free} are free": (
        "最多同时再保留 {kept} 个检查点，每个 {each}，共需 {needed}，剩余 {free}"
    ),
    "nothing is left to train: the run stopped early after step {done:,}: {reason}": (
        "没有剩余的训练：训练在第 {done:,} 步后提前停止：{reason}"
    ),
    "nothing is left to train: the checkpoint is at step {done:,} of {steps:,}": (
        "没有剩余的训练：检查点在第 {done:,} 步，共 {steps:,} 步"
    ),
    "more epochs (--epochs)": "增加轮数（--epochs）",
    "a larger trainer.early_stopping.patience, or another trainer.early_stopping.target": (
        "增大 trainer.early_stopping.patience，或改变 trainer.early_stopping.target"
    ),
    "--resume_from is not looked at for another machine: all steps count": (
        "询问另一台机器时不考虑 --resume_from：计入所有步骤"
    ),
    "--output_dir on a larger disk, or trainer.max_ckpt_to_keep=1": (
        "--output_dir 换到更大的磁盘，或 trainer.max_ckpt_to_keep=1"
    ),
    "{median:.2f} s a step, {tokens:,.0f} tokens/s: about {hours:.2f} h and a peak of {peak:.2f} GiB, both without "
    "evaluations and saves": (
        "每步 {median:.2f} 秒，{tokens:,.0f} token/秒：不计评估和保存，约需 {hours:.2f} 小时，内存峰值 {peak:.2f} GiB"
    ),
    "the measured steps failed: {last}": "试训练的步骤失败：{last}",
    # values
    "validation": "验证集",
    "on": "开启",
    "off": "关闭",
    "unlimited": "不限",
    "none in the model's folder; see its page before you publish what you train": (
        "模型目录中没有；发布训练结果之前请查看模型的主页"
    ),
    "weights": "权重",
    "gathered weights": "聚集的权重",
    "gradients": "梯度",
    "optimizer": "优化器",
    "activations": "激活值",
    "program": "程序",
    "export": "导出",
    "copies to save": "保存用的副本",
}
