"""scripts/completion.bash completes flags, keys, their values and the files of conf/."""

import subprocess

import pytest

from tests.support.runs import ROOT

COMPLETE = """
. {root}/scripts/completion.bash
complete -p train.sh >/dev/null
COMP_LINE='{line}' COMP_POINT={point} COMP_WORDBREAKS=$'{breaks}'
_sft_recipe
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def complete(line, breaks=" =:"):
    script = COMPLETE.format(root=ROOT, line=line, point=len(line), breaks=breaks)
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--epo", ["--epochs "]),
        ("--model_", ["--model_path "]),
        ("--dry", ["--dry_run "]),
        ("optim.weight", ["optim.weight_decay="]),
        ("lor", ["lora.enabled=", "lora.rank=", "lora="]),
        ("data.truncation=", ["drop ", "right ", "error "]),
        ("data.truncation=r", ["right "]),
        ("trainer.save_best=", ["true ", "false "]),
        ("lora=r1", ["r16 "]),
        ("--recipe long", ["long_context "]),
        ("--recipe=long", ["long_context "]),
        ("trainer.recipe=long", ["long_context "]),
        ("--recipe small --epo", ["--epochs "]),
        ("--recipe small optim.weight", ["optim.weight_decay="]),
        ("--strategy ", ["fsdp ", "fsdp2 ", "megatron "]),
        ("--strategy fsdp2", ["fsdp2 "]),
        ("--strategy=m", ["megatron "]),
        ("--launcher s", ["slurm "]),
        ("--lang ", ["en ", "zh "]),
        ("--use_lora=", ["true ", "false "]),
        ("--use_lora optim.weight", ["optim.weight_decay="]),
        ("--dry_run optim.weight", ["optim.weight_decay="]),
        ("--quality optim.weight", ["optim.weight_decay="]),  # of preview_data.py
        ("--lang zh optim.weight", ["optim.weight_decay="]),
        ("--train_data data", [""]),
        ("nothing.like.this", [""]),
    ],
)
def test_words_are_completed(typed, expected):
    found = complete(f"./train.sh --lr 1e-5 {typed}")
    assert set(expected) <= set(found) if typed == "lor" else found == expected


def test_every_recipe_is_completed():
    recipes = sorted(f"{path.stem} " for path in (ROOT / "conf/recipe").glob("*.yaml"))
    assert len(recipes) > 10 and complete("./train.sh --recipe ") == recipes


def test_a_shell_in_which_equals_separates_no_words_gets_complete_words():
    assert complete("./train.sh lora=r1", breaks=" ") == ["lora=r16 "]
