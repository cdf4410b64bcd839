"""Recipes: their numbers, their place between config.yaml and what the user sets, and errors that explain."""

import json

import pytest
import yaml

from sft_recipe.cli.flags import parse
from sft_recipe.config.compose import HOME, load_config, load_for_rank, recipe_folders, to_yaml
from sft_recipe.config.recipes import describe_recipes
from sft_recipe.config.schema import Config
from sft_recipe.launch.local import resolved_file
from tests.support.composing import error_of

RECIPES = sorted(path.stem for path in HOME.glob("conf/recipe/*.yaml"))
# Epochs, global batch, learn_rate, div_factor, warm-up steps, save_freq of the plans.
PLANS = {
    "chatlm": (5, 24 * 2 * 4, 1e-5, 50, 100, 500),
    "chatlm_a": (10, 16 * 2 * 3, 5e-5, 25, 300, 400),
    "chatlm_b": (8, 20 * 2 * 4, 3e-5, 40, 200, 500),
    "chatlm_c1": (8, 192, 3e-5, 50, 200, 500),
    "chatlm_c2": (8, 96, 3e-5, 50, 200, 500),
    "chatlm_c3": (8, 96, 5e-5, 50, 200, 500),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_to_its_values_and_says_what_it_is(name):
    text = (HOME / f"conf/recipe/{name}.yaml").read_text()
    package, title, *comment = [line for line in text.splitlines() if line.startswith("#")]
    assert package == "# @package _global_" and len(comment) > 1
    assert f"{name} " in describe_recipes(recipe_folders(HOME)) and title.removeprefix("# ").endswith(".")
    config = load_config([f"recipe={name}"]).model_dump(mode="json")
    for group, keys in yaml.safe_load(text).items():
        assert {key: config[group][key] for key in keys} == keys


@pytest.mark.parametrize(("name", "plan"), PLANS.items())
def test_plans_of_chatlm(name, plan):
    epochs, batch, rate, div_factor, warmup, save_freq = plan
    config = load_config([f"recipe={name}"])
    optim, trainer, data = config.optim, config.trainer, config.data
    assert (trainer.total_epochs, data.train_batch_size, trainer.save_freq) == (epochs, batch, save_freq)
    assert optim.lr == pytest.approx(rate * div_factor) and optim.div_factor == div_factor
    assert (optim.lr_warmup_steps, optim.lr_scheduler_type, optim.optimizer) == (warmup, "onecycle", "AdamW")
    assert (data.max_length, trainer.seed, trainer.max_ckpt_to_keep, trainer.log_freq) == (256, 23333, 5, 50)
    assert (data.max_chars, data.max_target_length) == (251, None)
    assert (config.model.freeze, config.fsdp.mixed_precision.param_dtype) == (["encoder", "embeddings"], "auto")


@pytest.mark.parametrize(("name", "rate", "length"), [("minimind", 1e-6, 340), ("minimind_2026", 1e-5, 768)])
def test_recipes_of_minimind(name, rate, length):
    config = load_config([f"recipe={name}"])
    optim = config.optim
    assert (config.data.train_batch_size, config.trainer.total_epochs, config.data.max_length) == (16, 2, length)
    assert (optim.lr, optim.lr_scheduler_type, optim.min_lr_ratio, optim.zero_indexed_step) == (
        rate,
        "cosine",
        0.1,
        False,
    )
    assert (config.data.random_system_prompt, config.data.drop_empty_thoughts) == (0.2, 0.8)
    assert (optim.lr_warmup_steps_ratio, optim.weight_decay, optim.clip_grad) == (0.0, 0.01, 1.0)


# Precedence


@pytest.fixture
def folder(tmp_path):
    """A folder with a config.yaml and another recipe."""
    groups = "".join(f"  - {group}: default\n" for group in ("model", "data", "optim", "fsdp", "lora", "eval"))
    keys = {"optim": {"lr": 1e-3, "weight_decay": 0.3}, "trainer": {"total_epochs": 7, "seed": 1}}
    (tmp_path / "config.yaml").write_text(f"defaults:\n{groups}  - _self_\n" + yaml.safe_dump(keys))
    (tmp_path / "conf/recipe").mkdir(parents=True)
    (tmp_path / "conf/recipe/mine.yaml").write_text(
        "# @package _global_\n# Mine.\noptim: {lr: 2.0e-3}\nlora: {rank: 3}\n"
    )
    return tmp_path


def compose(folder, *words, **variables) -> Config:
    """Compose as train.sh does."""
    return load_config(parse(words, variables).overrides, config_dir=folder)


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        ([], {}, 1e-3),
        (["--recipe", "mine"], {}, 2e-3),
        ([], {"RECIPE": "mine"}, 2e-3),
        (["recipe=mine"], {}, 2e-3),
        (["--recipe", "mine"], {"LR": "3e-3"}, 3e-3),
        (["--recipe", "mine", "--lr", "4e-3"], {"LR": "3e-3"}, 4e-3),
        (["optim.lr=5e-3", "--recipe", "mine", "--lr", "4e-3"], {"LR": "3e-3"}, 5e-3),
        (["optim.lr=5e-3", "recipe=mine"], {}, 5e-3),
        (["recipe=mine", "lora=r16"], {}, 2e-3),
    ],
)
def test_override_beats_flag_beats_variable_beats_recipe_beats_config_yaml(folder, words, variables, expected):
    config = compose(folder, *words, **variables)
    assert config.optim.lr == expected
    assert (config.optim.weight_decay, config.trainer.total_epochs) == (0.3, 7)  # of config.yaml
    assert config.data.max_length == 2048  # of conf/
    assert config.lora.rank == (16 if "lora=r16" in words else 8 if not words and not variables else 3)


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        (["--recipe", "mine"], {"RECIPE": "small"}, "mine"),
        (["recipe=minimind", "--recipe", "mine"], {}, "minimind"),
        (["recipe=minimind", "recipe=small"], {}, "small"),
        (["trainer.recipe=small"], {}, "small"),
        (["--recipe", "none"], {"RECIPE": "small"}, None),
    ],
)
def test_the_strongest_choice_of_a_recipe_is_the_only_one(folder, words, variables, expected):
    config = compose(folder, *words, **variables)
    assert config.trainer.recipe == expected
    assert config.optim.lr == {"mine": 2e-3, "minimind": 1e-6}.get(expected, 1e-3)


def test_a_recipe_may_be_a_file(folder, tmp_path, monkeypatch):
    (tmp_path / "my plan.yaml").write_text("trainer: {total_epochs: 9, hang_timeout: 5}\nmodel: {path: /a/model}\n")
    monkeypatch.chdir(tmp_path)
    for words in (["--recipe", "my plan.yaml"], ["recipe='./my plan.yaml'"], [f"--recipe={tmp_path}/my plan.yaml"]):
        config = compose(folder, *words)
        assert (config.trainer.total_epochs, config.trainer.heartbeat_timeout) == (9, 5)
        assert (config.model.path, config.model.fallback) == ("/a/model", None)


def test_config_yaml_may_name_a_recipe_as_a_key_or_in_its_defaults_list(folder):
    path = folder / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("trainer:\n", "trainer:\n  recipe: mine\n"))
    assert compose(folder).optim.lr == 2e-3 and compose(folder, "--recipe", "small").optim.lr == 1e-3
    path.write_text(text.replace("  - _self_", "  - recipe: mine\n  - _self_"))
    config = compose(folder)
    assert (config.optim.lr, config.trainer.recipe) == (2e-3, "mine")
    other = compose(folder, "--recipe", "minimind")
    assert (other.optim.lr, other.lora.rank) == (1e-6, 8)


def test_the_resolved_configuration_is_not_changed_by_its_recipe_again(folder, tmp_path):
    config = compose(folder, "--recipe", "mine", "--lr", "9e-3")
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.yaml").write_text(to_yaml(config))
    assert load_config([], config_dir=again).optim.lr == 9e-3


def test_ranks_know_the_recipe_and_what_was_changed(folder):
    config = compose(folder, "--recipe", "mine", "trainer.seed=4", LR="9e-3")
    assert config.changes == ("optim.lr=9e-3", "trainer.seed=4") and config.trainer.recipe == "mine"
    with resolved_file(config) as path:
        assert set(json.loads(path.read_text())) == {*Config.model_fields, "changes"}
        assert load_for_rank([f"--resolved-config={path}"]) == config
    assert compose(folder, "trainer.seed=4").changes == ()


# Errors


@pytest.mark.parametrize(
    ("recipe", "expected_texts"),
    [
        ("chatml", ["recipe chatml: there is none with this name", "Did you mean chatlm?"]),
        ("nothing/here.yaml", ["there is no such file", "--recipes"]),
        ("a.yaml", ["there is no such file"]),
        ("'small,minimind'", ["there is none with this name"]),
        ("small,minimind", ["a sweep over several values is not supported"]),
        ("[small]", ["it must be one name"]),
        ("''", ["it must be one name"]),
        ("3", ["it must be one name"]),
    ],
)
def test_unknown_recipe_is_one_message(recipe, expected_texts):
    message = error_of([f"recipe={recipe}"])
    assert [text for text in expected_texts if text not in message] == []


@pytest.mark.parametrize(
    ("content", "expected_text"),
    [
        ("optim: {lrr: 1.0e-3}\n", "optim.lrr is none. Did you mean optim.lr?"),
        ("lr: 1\n", "lr is none. Did you mean optim.lr?"),
        ("trainer: {recipe: small}\n", "a recipe cannot name another recipe; remove trainer.recipe"),
        ("defaults: [small]\n", "defaults is none"),
        ("optim: 3\n", "optim is none"),
        ("- 1\n", "it contains a list, not keys"),
        ("optim: {lr: fast}\n", "optim.lr is 'fast'"),
        ("a: b: c\n", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_message(tmp_path, content, expected_text):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert expected_text in error_of([f"recipe={path}"])


def test_a_warmup_ratio_beside_the_steps_of_a_recipe_is_a_notice(capsys):
    config = load_config(["recipe=chatlm_a", "optim.lr_warmup_steps_ratio=0.2"])
    assert config.optim.lr_warmup_steps == 300
    assert "optim.lr_warmup_steps_ratio has no effect beside optim.lr_warmup_steps=300" in capsys.readouterr().err
    load_config(["recipe=chatlm_a", "optim.lr_warmup_steps_ratio=0.2", "optim.lr_warmup_steps=-1"])
    assert "has no effect on onecycle" in capsys.readouterr().err
    load_config(["optim.lr_warmup_steps_ratio=0.2"])
    assert capsys.readouterr().err == ""
