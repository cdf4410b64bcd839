"""The Chinese texts of the report, by their English originals in words.py and page.html."""

CHINESE = {
    # findings
    "The loss or its gradient is not finite.": "损失或梯度不是有限值。",
    "{count} of {steps:# step}, the first one step {step}, at a learning rate of up to {rate:.1e}.": (
        "{steps} 步中有 {count} 步，最早是第 {step} 步，学习率最高为 {rate:.1e}。"
    ),
    "Lower the learning rate to a fifth (--lr). If it is the first step, look for NaN in the model's weights, or "
    "compute in fp32 (fsdp.mixed_precision.param_dtype=fp32).": (
        "把学习率降到五分之一（--lr）。如果是第一步，请检查模型权重中是否有 NaN，或用 fp32 计算"
        "（fsdp.mixed_precision.param_dtype=fp32）。"
    ),
    "The loss exploded.": "损失爆炸。",
    "The smoothed loss was {low:.2f} and rose above 10 at step {step}, to {loss:.2f}; the learning rate reached "
    "{rate:.1e}.": "平滑后的损失曾为 {low:.2f}，在第 {step} 步超过 10，最高到 {loss:.2f}；学习率最高为 {rate:.1e}。",
    "Lower the learning rate to a tenth (--lr), and keep GRAD_CLIP at 1 or less.": (
        "把学习率降到十分之一（--lr），GRAD_CLIP 保持在 1 或以下。"
    ),
    "The loss rises instead of falling: the learning rate is too high.": "损失上升而不是下降：学习率过高。",
    "The smoothed loss goes from {start:.2f} to {end:.2f} and rises from step {step} on; the learning rate reached "
    "{rate:.1e}.": "平滑后的损失从 {start:.2f} 变为 {end:.2f}，从第 {step} 步开始上升；学习率最高为 {rate:.1e}。",
    "Lower the learning rate to a fifth (--lr).": "把学习率降到五分之一（--lr）。",
    "The loss oscillates: the learning rate is too high for the batch.": "损失振荡：相对于批大小，学习率过高。",
    "The smoothed loss rose and fell {count:# time} by more than {size:.2f}; the learning rate reached {rate:.1e}.": (
        "平滑后的损失有 {count} 次升降幅度超过 {size:.2f}；学习率最高为 {rate:.1e}。"
    ),
    "Halve the learning rate (--lr), or double the batch (--batch_size).": (
        "把学习率减半（--lr），或把批大小加倍（--batch_size）。"
    ),
    "The loss jumps at the start: the warm-up is too short.": "损失在开头跳升：预热太短。",
    "The loss was {start:.2f} and its mean rose to {peak:.2f}; the warm-up is {warmup} of {total:# step}, less "
    "than 3%.": ("损失起初为 {start:.2f}，均值升到 {peak:.2f}；预热为 {total} 步中的 {warmup} 步，不足 3%。"),
    "Warm up over 3% to 10% of the steps (--warmup_ratio 0.1).": "用 3% 到 10% 的步数预热（--warmup_ratio 0.1）。",
    "Answers are cut off before their end.": "回答在结尾前被截断。",
    "{count:,} of {records:# record} ({percent:.0f}%) {count:is|are} longer than MAX_LENGTH {limit:,} and cut off.": (
        "{records:,} 条记录中有 {count:,} 条（{percent:.0f}%）超过 MAX_LENGTH {limit:,}，结尾被截掉。"
    ),
    "Raise MAX_LENGTH (--max_length), or leave long records out (data.truncation=drop).": (
        "提高 MAX_LENGTH（--max_length），或舍弃过长的记录（data.truncation=drop）。"
    ),
    "The model is not trained to end its answers.": "模型没有学习如何结束回答。",
    "In {count:,} of {sampled:# example} no end token has a loss.": (
        "{sampled:,} 个样本中有 {count:,} 个的结束 token 不计算损失。"
    ),
    "Look at the end of the answers in scripts/preview_data.py; the generation block of a chat template must include "
    "the end token.": ("用 scripts/preview_data.py 查看回答的结尾；对话模板的 generation 块必须包含结束 token。"),
    "A large part of the data is left out.": "很大一部分数据被舍弃。",
    "{count:,} of {records:# record} ({percent:.0f}%) {count:is|are} longer than MAX_LENGTH {limit:,}.": (
        "{records:,} 条记录中有 {count:,} 条（{percent:.0f}%）超过 MAX_LENGTH {limit:,}。"
    ),
    "Raise MAX_LENGTH (--max_length), or split long records.": "提高 MAX_LENGTH（--max_length），或拆分过长的记录。",
    "The warm-up is as long as the run: the learning rate never reaches its peak for good.": (
        "预热与整个训练一样长：学习率始终没有真正达到峰值。"
    ),
    "The warm-up takes {warmup:# step} and the run {total}; the learning rate reached {reached:.1e} of {rate:.1e}.": (
        "预热 {warmup} 步，训练共 {total} 步；学习率达到 {reached:.1e}，设定为 {rate:.1e}。"
    ),
    "Warm up over 3% to 10% of the steps (--warmup_ratio 0.1; onecycle: optim.pct_start=0.3), without "
    "optim.lr_warmup_steps.": (
        "用 3% 到 10% 的步数预热（--warmup_ratio 0.1；onecycle：optim.pct_start=0.3），不设 optim.lr_warmup_steps。"
    ),
    "Very few tokens are supervised.": "计算损失的 token 极少。",
    "{supervised:,} of {tokens:# token} ({percent:.1f}%) {supervised:has|have} a loss.": (
        "{tokens:,} 个 token 中有 {supervised:,} 个（{percent:.1f}%）计算损失。"
    ),
    "Look at scripts/preview_data.py: are the answers there, and does data.train_on select the turns that you mean? "
    "Long prompts that repeat can be shortened.": (
        "用 scripts/preview_data.py 查看：回答是否存在，data.train_on 是否选中了想要的轮次？重复的长提示可以缩短。"
    ),
    "The batch is very large for the data: there are few updates.": "相对于数据量，批过大：更新次数很少。",
    "BATCH_SIZE {batch} makes {per_epoch:# step} an epoch and {total} in the run.": (
        "BATCH_SIZE 为 {batch} 时，每轮只有 {per_epoch} 步，整个训练 {total} 步。"
    ),
    "Lower BATCH_SIZE to at least 20 steps an epoch, or train more epochs.": (
        "减小 BATCH_SIZE，使每轮至少 20 步，或多训练几轮。"
    ),
    "The loss does not fall: the learning rate is too low.": "损失不下降：学习率过低。",
    "{metric} goes from {start:.3f} to {end:.3f} in {steps:# step}, at a learning rate of up to {rate:.1e}.": (
        "{metric} 在 {steps} 步内从 {start:.3f} 变为 {end:.3f}，学习率最高为 {rate:.1e}。"
    ),
    "Raise the learning rate (--lr): 2e-5 is usual for full fine-tuning, 2e-4 with LoRA.": (
        "提高学习率（--lr）：全参数微调通常用 2e-5，LoRA 通常用 2e-4。"
    ),
    "The loss stays high and flat: the model learns nothing.": "损失居高不下：模型什么也没有学到。",
    "Check the chat template and the language of the model with scripts/preview_data.py; then try a learning rate "
    "five times as high, and one of a fifth.": (
        "用 scripts/preview_data.py 检查对话模板和模型的语言；然后分别尝试五倍和五分之一的学习率。"
    ),
    "The loss does not fall.": "损失不下降。",
    "Try half and twice the learning rate (--lr); look at the data with scripts/preview_data.py.": (
        "分别尝试一半和两倍的学习率（--lr）；用 scripts/preview_data.py 查看数据。"
    ),
    "The loss falls too slowly.": "损失下降太慢。",
    "At the end the smoothed loss is {end:.2f}, from {start:.2f}, and still falls; the learning rate reached "
    "{rate:.1e}.": "结束时平滑后的损失为 {end:.2f}（起初 {start:.2f}），仍在下降；学习率最高为 {rate:.1e}。",
    "Double the learning rate (--lr), or train more epochs (--epochs).": (
        "把学习率加倍（--lr），或多训练几轮（--epochs）。"
    ),
    "The model over-fits from step {step} on.": "模型从第 {step} 步开始过拟合。",
    "The validation loss was best at step {step} ({best:.3f}) and is {last:.3f} now, while the training loss went "
    "from {before:.3f} to {now:.3f}.": (
        "验证损失在第 {step} 步最低（{best:.3f}），现在为 {last:.3f}，而训练损失从 {before:.3f} 降到 {now:.3f}。"
    ),
    "Use the checkpoint of that evaluation (checkpoints/best). Next time train fewer epochs, or set "
    "trainer.early_stopping.patience=2.": (
        "使用那次评估的检查点（checkpoints/best）。下次少训练几轮，或设置 trainer.early_stopping.patience=2。"
    ),
    "The model is worse than before training: the learning rate is too high for full fine-tuning.": (
        "模型比训练前更差：对全参数微调来说学习率过高。"
    ),
    "{metric} was {before:.3f} before the first step and is {after:.3f} now, at a learning rate of up to {rate:.1e}.": (
        "{metric} 在训练前为 {before:.3f}，现在为 {after:.3f}，学习率最高为 {rate:.1e}。"
    ),
    "Lower the learning rate to 1e-5 or less (--lr), or train adapters (--use_lora).": (
        "把学习率降到 1e-5 或以下（--lr），或训练适配器（--use_lora）。"
    ),
    "The model forgets what it knew.": "模型遗忘了原有的能力。",
    "The loss on general prompts was {before:.3f} before the first step and is {after:.3f} now, at a learning rate of "
    "up to {rate:.1e}.": "通用提示上的损失在训练前为 {before:.3f}，现在为 {after:.3f}，学习率最高为 {rate:.1e}。",
    "Lower the learning rate (--lr) or the number of epochs, train adapters (--use_lora), or mix general examples into "
    "the data.": "降低学习率（--lr）或减少轮数，训练适配器（--use_lora），或在数据中混入通用样本。",
    "The model is worse than before training.": "模型比训练前更差。",
    "Check that training and validation data are of one kind, then lower the learning rate (--lr) or the number of "
    "epochs.": "检查训练数据和验证数据是否同类，然后降低学习率（--lr）或减少轮数。",
    "The model gives empty answers.": "模型给出空回答。",
    "{count} of {answers:# answer} at step {step} {count:is|are} empty.": (
        "第 {step} 步的 {answers} 个回答中有 {count} 个为空。"
    ),
    "Look for empty responses in the data (scripts/preview_data.py), and lower the learning rate.": (
        "检查数据中是否有空回答（scripts/preview_data.py），并降低学习率。"
    ),
    "The model repeats itself.": "模型不断重复。",
    "{count} of {answers:# answer} at step {step} {count:ends|end} in a phrase that comes again and again.": (
        "第 {step} 步的 {answers} 个回答中有 {count} 个以反复出现的短语结尾。"
    ),
    "Train longer or with a higher learning rate if the loss still falls, else with a lower one and fewer epochs; "
    "look for duplicates in the data.": (
        "如果损失仍在下降，就延长训练或提高学习率；否则降低学习率、减少轮数；并检查数据中的重复。"
    ),
    "The answers do not end.": "回答没有结束。",
    "{count} of {answers:# answer} at step {step} reached eval.max_new_tokens ({tokens}), past the end of "
    "the reference.": (
        "第 {step} 步的 {answers} 个回答有 {count} 个达到 eval.max_new_tokens（{tokens}），且长于参考回答。"
    ),
    "Train longer if the loss still falls; check with scripts/preview_data.py that the end token is supervised.": (
        "如果损失仍在下降，就延长训练；并用 scripts/preview_data.py 检查结束 token 是否计算损失。"
    ),
    "Gradients are clipped strongly in most steps.": "多数步的梯度被大幅裁剪。",
    "{percent:.0f}% of the steps exceed GRAD_CLIP {limit:g}; the median norm is {median:.1f}.": (
        "{percent:.0f}% 的步超过 GRAD_CLIP {limit:g}；范数的中位数为 {median:.1f}。"
    ),
    "Raise GRAD_CLIP to about the median if the loss is stable, else lower the learning rate.": (
        "如果损失稳定，可把 GRAD_CLIP 提高到中位数附近；否则降低学习率。"
    ),
    "Ranks wait for others in most steps.": "多数步中有进程在等待其他进程。",
    "With {batch:# example} a step, {percent:.0f}% of the time of {ranks:# rank} is unused.": (
        "每步 {batch} 个样本，使 {ranks} 个进程的 {percent:.0f}% 时间闲置。"
    ),
    "Raise BATCH_SIZE to several examples for each rank, or use fewer ranks.": (
        "提高 BATCH_SIZE，使每个进程有多个样本，或减少进程数。"
    ),
    "Most of what is computed is padding.": "大部分计算花在填充上。",
    "{percent:.0f}% of the computed tokens are padding, with BATCH_SIZE {batch}.": (
        "BATCH_SIZE 为 {batch} 时，计算的 token 中有 {percent:.0f}% 是填充。"
    ),
    "Raise BATCH_SIZE, so that examples of like length share a micro-batch, or lower MICRO_BATCH_SIZE.": (
        "提高 BATCH_SIZE，使长度相近的样本进入同一个微批次，或降低 MICRO_BATCH_SIZE。"
    ),
    "Training waits for its data.": "训练在等待数据。",
    "{percent:.0f}% of the time ({seconds:.0f} s) went into reading examples.": (
        "{percent:.0f}% 的时间（{seconds:.0f} 秒）用于读取样本。"
    ),
    "Put data.cache_dir on a fast local disk, and leave memory for the page cache.": (
        "把 data.cache_dir 放在快速的本地磁盘上，并为页缓存留出内存。"
    ),
    "page: {path}": "页面：{path}",
    "The goals are reached: loss {loss:.2f} (below 1.5) and BLEU-4 {bleu:.1f} (above 15).": (
        "目标已达到：损失 {loss:.2f}（低于 1.5），BLEU-4 {bleu:.1f}（高于 15）。"
    ),
}
