"""The Chinese texts of the preview page: by their English originals in html.py and page.html, and as in terminal.py."""

from sft_recipe.data.preview.stats import Example, Settings, roles_of
from sft_recipe.data.preview.terminal import exceeded, pattern
from sft_recipe.data.sources import SourceCounts
from sft_recipe.display import printable

CHINESE = {
    "Data preview": "数据预览",
    "Model": "模型",
    "truncation": "截断方式",
    "Records": "记录",
    "{count} tokens": "{count} 个 token",
    "Supervised": "计算损失",
    "Over MAX_LENGTH": "超过 MAX_LENGTH",
    "max {count} tokens": "最长 {count} 个 token",
    "left out": "舍弃",
    "truncated": "截断",
    "training stops": "训练停止",
    "Duplicates": "重复",
    "exact copies": "完全相同",
    "all records differ": "没有相同的记录",
    "Rejected": "无法使用",
    "all records are valid": "所有记录都可用",
    "Padding": "填充",
    "Packing saves": "打包节省",
    "of padded tokens": "（与填充相比）",
    "Length of the records, in tokens": "记录的长度（token）",
    "median {median}, p95 {p95}, max {longest}": "中位数 {median}，p95 {p95}，最长 {longest}",
    "Supervised tokens per record": "每条记录计算损失的 token",
    "percentage of tokens with a loss": "计算损失的 token 占比",
    "histogram": "直方图",
    "{range} tokens": "{range} 个 token",
    "{range}% supervised": "{range}% 计算损失",
    "{records} over a limit": "{records}超过上限",
    "Over a limit": "超过上限",
    "over a limit": "超过上限",
    "to {value}": "至 {value}",
    "in characters: median {median}, p95 {p95}, max {longest}": "字符数：中位数 {median}，p95 {p95}，最长 {longest}",
    "At {limits}": "上限 {limits}",
    "Tokens trained on": "用于训练的 token",
    "{count} of {records} longer, {effect}: {tokens} lost, {supervised} supervised ({part} of all supervised).": (
        "{records}中有 {count} 条更长，{effect}：损失{tokens}，其中 {supervised} 个计算损失（占全部的 {part}）。"
    ),
    "No record is longer; the longest uses {part} of it.": "没有更长的记录；最长的用到上限的 {part}。",
    "{records} left out: no supervised token remains.": "舍弃{records}：没有剩下计算损失的 token。",
    "Packing, tokens per epoch": "打包，每轮的 token",
    "Padded to the longest of each batch": "填充到每批中最长的",
    "Packed, without padding": "打包，没有填充",
    "Padding, tokens per epoch": "填充，每轮的 token",
    "Padded to the longest of each micro-batch": "填充到每个微批次中最长的",
    "Without padding": "没有填充",
    "{steps} in {batches} of up to {budget} tokens, {part} full; {remark}.": (
        "{steps}，{batches}，每个最多 {budget} 个 token，利用率 {part}；{remark}。"
    ),
    "no cross-document attention": "注意力不跨文档",
    "the last answer of each record is its target": "每条记录的最后一个回答是目标",
    "An epoch contains {mix}.": "每轮包含 {mix}。",
    "Role patterns": "角色顺序",
    "and {patterns}": "另有{patterns}",
    "{records} with reasoning in the last turn that the chat template drops: it is not trained on.": (
        "{records}的最后一轮有推理内容，但被对话模板去掉：不参与训练。"
    ),
    "{answers} whose first token also has the end of the prompt in it, such as a space: it is not trained on, and at "
    "inference the prompt is tokenized differently. Use a chat template whose generation prompt does not end in a "
    "space.": (
        "{answers}的第一个 token 同时含有提示的结尾（例如空格）：它不参与训练，而且推理时提示的分词不同。"
        "请使用生成提示不以空格结尾的对话模板。"
    ),
    "{records} with text that spells a special token; it stays text.": (
        "{records}含有与特殊 token 同形的文本；仍按文本处理。"
    ),
    "{count} of {conversations}": "{conversations}中的 {count} 段",
    "supervised": "计算损失",
    "context (no loss)": "上下文（不计算损失）",
    "special token": "特殊 token",
    "token boundaries": "token 边界",
    "Show all": "全部显示",
    "Show less": "收起",
    "Records to check": "值得检查的记录",
    "Longest records": "最长的记录",
    "Fewest supervised tokens": "计算损失的 token 最少的记录",
    "Record": "记录",
    "Tokens": "token",
    "Exact duplicates": "完全重复",
    "{records} with the same tokens as an earlier record; most repeated:": (
        "{records}与之前的记录 token 相同；重复最多的："
    ),
    "No two records have the same tokens.": "没有 token 相同的记录。",
    "Rejected records": "无法使用的记录",
    "{records} that cannot be used ({kinds}):": "{records}无法使用（{kinds}）：",
    "{records} that cannot be used ({kinds}); first {count}:": "{records}无法使用（{kinds}）；前 {count} 条：",
}
COUNTED = {
    "record": "{count} 条记录",
    "answer": "{count} 个回答",
    "token": "{count} 个 token",
    "more token": "还有 {count} 个 token",
    "step": "{count} 步",
    "micro-batch": "{count} 个微批次",
    "conversation": "{count} 段对话",
    "rarer pattern": "{count} 种较少见的顺序",
}
TOO_LONG = {"drop": "舍弃这条记录", "right": "去掉最后 {over} 个 token", "error": "训练停止"}


def plural(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return COUNTED[noun].format(count=f"{number:,}")


def counts_line(example: Example, settings: Settings) -> str:
    """Describe an example: tokens, supervised tokens and roles."""
    percent, roles = 100 * example.supervised / example.tokens, pattern(roles_of(example.record))
    size = f"{example.tokens:,} 个 token" + (f"（{example.characters:,} 个字符）" if example.characters else "")
    line = f"{size}，其中 {example.supervised:,} 个计算损失（{percent:.0f}%）"
    if settings.max_target_length is not None:
        source = example.encoded.source_length
        line = f"源 {source:,} 个 token，回答 {example.tokens - source:,} 个 token（全部计算损失）"
    return f"{line}；{roles}" if example.record.messages else line


def too_long(example: Example, settings: Settings) -> str:
    """Describe the consequence for an example that is longer than the limits, "" for others."""
    over = exceeded(example, settings)
    effect = TOO_LONG[settings.truncation].format(over="、".join(f"{count:,}" for count in over.values()))
    return f"超过 {'、'.join(over)}：{effect}" if over else ""


def more_tokens(example: Example, limit: int) -> str:
    """Return the number of tokens after the limit, which are not displayed, or "" if there are none."""
    return plural(example.tokens - limit, "more token") if example.tokens > limit else ""


def mixture_text(sources: list[SourceCounts]) -> str:
    """Describe what an epoch contains of each source; "" if it contains everything."""
    if all(source.target_count == source.examples for source in sources):
        return ""
    counts = [(printable(source.name), source.examples, source.target_count) for source in sources]
    return "，".join(f"{name} 的 {examples:,} 条中的 {count:,} 条" for name, examples, count in counts)
