"""Any text passes through flags, variables and overrides unchanged."""

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sft_recipe.cli.flags import parse
from tests.cli.test_flags import resolved

ODD = st.sampled_from(list("'\"\\$ {}=,[]()<>|&;*?~#@%!:/._-+^`0aZ")) | st.sampled_from(["${", "\\'", "你", "é", "1e5"])
PATHS = st.lists(ODD | st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12).map("".join)


@settings(max_examples=60)
@given(PATHS)
@example("--")
@example("C:\\new\\\\dir\\")
@example("a'b\"c")
@example("\\'")
@example("${HOME}/x")
@example("\\${x}\\\\${y}${")
@example("$HOME $(ls) `ls`")
@example(" a b ")
@example("2024_01_02")
@example("1.10")
@example("true")
@example("你好, 世界.json")
@example("a=b")
@example("[a,b].json")
@example("[ab],[cd].json")
@example("{a: b}")
def test_any_path_is_passed_unchanged(path):
    assume(not (path.startswith("[") and path.endswith("]")))  # a list
    files = [part for part in path.split(",") if part]
    assume(files and not {path.lower(), *map(str.lower, files)} & {"none", "null", "???"})
    config = resolved(f"--train_data={path}", f"--output_dir={path}", VAL_DATA=path, RESUME_FROM=path)
    for files_read in (config.data.train_files, config.data.val_files):
        assert ([files_read] if isinstance(files_read, str) else files_read) == files
    assert config.trainer.output_dir == config.trainer.resume_from == path
    if not path.startswith("-"):
        assert parse(["--output_dir", path], {}).overrides == parse([], {"OUTPUT_DIR": path}).overrides
