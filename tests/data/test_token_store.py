"""The token store: what is in it, when it is reused, when it is built anew, and what a failed build leaves."""

import json
import os
import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, ByT5Tokenizer

from sft_recipe.data import token_store as cache
from sft_recipe.data import tokenize as encode
from sft_recipe.data.formats import read_conversations
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from sft_recipe.data.token_store import Examples, TokenStore, open_store
from sft_recipe.data.tokenize import StoreOptions
from sft_recipe.errors import DataError, ModelError
from tests.support import tiny

FILES = ["store.json", "offsets.npy", "supervised.npy", "digests.npy", "input_ids.bin", "loss_mask.bin"]
RECORDS = [
    {"prompt": "Hello there", "response": "I am fine, thank you."},
    {"prompt": "你好", "response": "很好，谢谢。"},
    {"prompt": "1 2 3", "response": "4 5 6 " * 20},
    {"prompt": "What is the capital of France?", "response": "Paris."},
]


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data.json", RECORDS)


@pytest.fixture
def cache_dir(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def no_building(monkeypatch):
    """Call it to make every further build an error."""

    def refuse(*_):
        raise AssertionError("the store was built again")

    return lambda: monkeypatch.setattr(cache, "_build", refuse)


def write(path: Path, records: list[dict]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def build(files, tokenizer, cache_dir, workers=1, **options) -> TokenStore:
    files = [files] if isinstance(files, Path) else files
    return open_store(files, tokenizer, StoreOptions(**options), cache_dir, workers)


def examples(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), mask.tolist()) for ids, mask in (store[index] for index in range(len(store)))]


def encoded(tokenizer, *files: Path) -> list[tuple[list[int], list[int]]]:
    """The oracle: each record by itself."""
    renderer = Renderer(tokenizer)
    encoded = [renderer.encode(conversation) for path in files for conversation in read_conversations(path)]
    return [(example.input_ids, example.loss_mask) for example in encoded]


def left_behind(cache_dir: Path) -> list[str]:
    return [path.name for path in cache_dir.rglob("*")] if cache_dir.is_dir() else []


def stores(cache_dir: Path) -> list[str]:
    return [path.name for path in (cache_dir / "tokens").iterdir()]


# Contents


def test_a_store_holds_what_the_renderer_says_of_each_record(data, tokenizer, cache_dir):
    store = build(data, tokenizer, cache_dir)
    expected = encoded(tokenizer, data)
    assert examples(store) == expected
    assert len(store) == len(RECORDS)
    assert store.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert store.supervised.tolist() == [sum(mask) for _, mask in expected]
    assert {ids.dtype for ids, _ in (store[0], store[3])} == {np.dtype(np.int32)}
    assert {mask.dtype for _, mask in (store[0], store[3])} == {np.dtype(np.uint8)}


def test_several_files_come_in_the_order_given(data, tokenizer, cache_dir, tmp_path):
    other = tmp_path / "a.jsonl"
    other.write_text('{"instruction": "add", "output": "1 2"}\n')
    assert examples(build([data, other], tokenizer, cache_dir)) == encoded(tokenizer, data, other)
    assert examples(build([other, data], tokenizer, cache_dir)) == encoded(tokenizer, other, data)


def test_the_report_counts_what_is_there(data, tokenizer, cache_dir):
    report = build(data, tokenizer, cache_dir).report
    expected = encoded(tokenizer, data)
    assert (report.records, report.examples, report.too_long, report.without_target) == (4, 4, 0, 0)
    assert report.longest == max(len(ids) for ids, _ in expected)
    assert report.tokens == sum(len(ids) for ids, _ in expected)
    assert report.supervised == sum(sum(mask) for _, mask in expected)


def test_a_store_is_memory_mapped_and_read_only(data, tokenizer, cache_dir):
    """So that a rank's own memory does not grow with the data."""
    store = build(data, tokenizer, cache_dir)
    for array in (*store[0], store.offsets, store.supervised, store.digests):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


def test_examples_are_a_part_of_a_store(data, tokenizer, cache_dir):
    store = build(data, tokenizer, cache_dir)
    part = Examples(store, np.array([3, 1]))
    assert len(part) == 2
    assert part.lengths.tolist() == [store.lengths[3], store.lengths[1]]
    assert part.supervised == store.supervised[3] + store.supervised[1]
    assert part[1][0].tolist() == store[1][0].tolist()


# The fingerprint


def test_equal_examples_have_equal_fingerprints(data, tokenizer, cache_dir, tmp_path):
    """Spelt in another way, in another format, in another file, under another limit: the model sees the same."""
    roles = {"user": "prompt", "assistant": "response"}
    turns = [[{"role": role, "content": record[field]} for role, field in roles.items()] for record in RECORDS]
    same = write(tmp_path / "other.json", [{"messages": messages} for messages in turns])
    first = build(data, tokenizer, cache_dir)
    second = build(same, tokenizer, cache_dir, max_length=1000)
    assert first.folder != second.folder
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    "records",
    [
        RECORDS[::-1],
        RECORDS[:-1],
        [*RECORDS, RECORDS[0]],
        [*RECORDS[:2], {**RECORDS[2], "prompt": "1 2 9"}, RECORDS[3]],
    ],
    ids=["order", "fewer", "more", "one token"],
)
def test_other_examples_have_other_fingerprints(records, data, tokenizer, cache_dir, tmp_path):
    other = write(tmp_path / "other.json", records)
    assert build(data, tokenizer, cache_dir).fingerprint != build(other, tokenizer, cache_dir).fingerprint


def test_the_same_tokens_under_another_mask_have_another_fingerprint(data, tokenizer, cache_dir, tmp_path):
    marked = tiny.CHATML.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
        "{{ '<|im_end|>' + '\n' }}",
    )
    first = build(data, tokenizer, cache_dir)
    second = build(data, tiny.build_tokenizer(marked), cache_dir)
    assert [ids for ids, _ in examples(first)] == [ids for ids, _ in examples(second)]
    assert first.fingerprint != second.fingerprint


# Reuse


@pytest.mark.parametrize("change", ["nothing", "touched", "moved"])
def test_a_store_is_reused_where_nothing_that_matters_changed(change, data, tokenizer, cache_dir, no_building):
    first = build(data, tokenizer, cache_dir)
    no_building()
    if change == "touched":
        os.utime(data, (1, 1))
    if change == "moved":
        data = data.rename(data.with_name("renamed.json"))
    second = build(data, tokenizer, cache_dir)
    assert second.folder == first.folder
    assert examples(second) == examples(first)
    assert second.report == first.report


def test_a_store_is_reused_by_a_tokenizer_loaded_anew(data, cache_dir, tmp_path, no_building):
    """One whose file asks for truncation and padding forgets that on first use."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def loaded():
        return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    used = loaded()
    used("Hello there, how are you today?")
    first = build(data, used, cache_dir)
    assert examples(first) == encoded(tiny.build_tokenizer(), data)
    no_building()
    assert build(data, loaded(), cache_dir).folder == first.folder


def edited_file(data, tokenizer, options):
    write(data, [*RECORDS[:-1], {**RECORDS[-1], "response": "4"}])
    return tokenizer, options


def other_vocabulary(data, tokenizer, options):
    return tiny.build_tokenizer(vocab_size=400), options


def an_added_token(data, tokenizer, options):
    tokenizer.add_tokens(["Paris"])
    return tokenizer, options


def other_chat_template(data, tokenizer, options):
    tokenizer.chat_template = "{{ 'Be brief. ' }}" + tiny.CHATML
    return tokenizer, options


def other_special_tokens(data, tokenizer, options):
    """The vocabulary is the same; a template may show eos_token."""
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer, options


def special_token_for_the_renderer(data, tokenizer, options):
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("Paris.", special=True)]})
    return tokenizer, options


def other_max_length(data, tokenizer, options):
    return tokenizer, replace(options, max_length=60)


def other_truncation(data, tokenizer, options):
    return tokenizer, replace(options, truncation="right")


def other_format(data, tokenizer, options):
    return tokenizer, replace(options, format="prompt_response")


def other_columns(data, tokenizer, options):
    return tokenizer, replace(options, columns={"prompt": "prompt"})


def bad_records_skipped(data, tokenizer, options):
    return tokenizer, replace(options, on_bad_record="skip")


def other_turns(data, tokenizer, options):
    return tokenizer, replace(options, render=RenderOptions(train_on="last"))


def special_text_allowed(data, tokenizer, options):
    return tokenizer, replace(options, render=RenderOptions(parse_special_tokens=True))


CHANGES = [
    other_columns,
    bad_records_skipped,
    other_turns,
    special_text_allowed,
    edited_file,
    other_vocabulary,
    an_added_token,
    other_chat_template,
    other_special_tokens,
    special_token_for_the_renderer,
    other_max_length,
    other_truncation,
    other_format,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_store_is_built_anew_where_something_changed(change, data, cache_dir):
    tokenizer, options = tiny.build_tokenizer(), StoreOptions(max_length=80)
    first = open_store([data], tokenizer, options, cache_dir, workers=1)
    old = examples(first)
    tokenizer, options = change(data, tokenizer, options)
    second = open_store([data], tokenizer, options, cache_dir, workers=1)
    assert second.folder != first.folder
    limit, cuts = options.max_length, options.truncation == "right"
    fresh = [(ids[:limit], mask[:limit]) for ids, mask in encoded(tokenizer, data) if cuts or len(ids) <= limit]
    assert examples(second) == fresh
    assert examples(TokenStore.open(first.folder)) == old


def test_other_code_and_other_libraries_are_part_of_the_key(data, tokenizer, monkeypatch):
    def key():
        return cache.store_key([data], tokenizer, StoreOptions())

    first = key()
    assert key() == first
    monkeypatch.setattr(cache.transformers, "__version__", "0")
    assert key() != first
    monkeypatch.undo()
    read_bytes = Path.read_bytes
    for module in ("formats", "renderer", "mask_plan"):
        monkeypatch.setattr(
            Path, "read_bytes", lambda path, module=module: read_bytes(path) + b"#" * (path.name == f"{module}.py")
        )
        assert key() != first, module
        monkeypatch.undo()


def test_where_one_file_ends_and_the_next_begins_is_part_of_the_key(tokenizer, tmp_path):
    def key(*texts):
        files = [tmp_path / f"{number}.jsonl" for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        return cache.store_key(files, tokenizer, StoreOptions())

    assert len({key("ab", "c"), key("a", "bc"), key("abc"), key("abc", ""), key("c", "ab")}) == 5


# Damage


def cut_to_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_by_one_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_by_one_token(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES = [Path.unlink, cut_to_half, cut_by_one_byte, cut_by_one_token, cut_to_nothing]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_store_is_built_anew(damage, name, data, tokenizer, cache_dir):
    folder = build(data, tokenizer, cache_dir).folder
    damage(folder / name)
    with pytest.raises(cache.DAMAGE):
        TokenStore.open(folder)
    store = build(data, tokenizer, cache_dir)
    assert examples(store) == encoded(tokenizer, data)
    assert examples(TokenStore.open(folder)) == examples(store)
    assert stores(cache_dir) == [folder.name]


@pytest.mark.parametrize("name", ["store.json", "offsets.npy", "supervised.npy"])
def test_noise_in_place_of_what_describes_a_store_is_damage_too(name, data, tokenizer, cache_dir):
    folder = build(data, tokenizer, cache_dir).folder
    (folder / name).write_bytes(b"\xff" * (folder / name).stat().st_size)
    assert examples(build(data, tokenizer, cache_dir)) == encoded(tokenizer, data)


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"of": "a later version"}'])
def test_a_store_described_in_another_way_is_built_anew(text, data, tokenizer, cache_dir):
    folder = build(data, tokenizer, cache_dir).folder
    (folder / "store.json").write_text(text)
    assert examples(build(data, tokenizer, cache_dir)) == encoded(tokenizer, data)


def test_a_store_whose_parts_are_of_two_stores_is_damaged(data, tokenizer, cache_dir):
    folder = build(data, tokenizer, cache_dir).folder
    np.save(folder / "supervised.npy", np.arange(7))
    assert build(data, tokenizer, cache_dir).supervised.tolist() == [sum(mask) for _, mask in encoded(tokenizer, data)]


# Failed builds


def test_a_bad_record_late_in_a_file_leaves_no_folder(tokenizer, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK", 1)
    monkeypatch.setattr(encode, "IN_PROCESS", 2)
    bad = write(tmp_path / "bad.json", [*RECORDS, {"prompt": "Hi", "response": ""}])
    with pytest.raises(DataError, match="bad.json, record 5.*response"):
        build(bad, tokenizer, cache_dir)
    assert left_behind(cache_dir) == ["tokens"]


def test_a_failure_of_any_kind_leaves_no_folder(data, tokenizer, cache_dir, monkeypatch):
    def stopped(*_):
        assert any("partial" in name for name in left_behind(cache_dir))
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_check", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(data, tokenizer, cache_dir)
    assert left_behind(cache_dir) == ["tokens"]
    monkeypatch.undo()
    assert examples(build(data, tokenizer, cache_dir)) == encoded(tokenizer, data)


@pytest.mark.parametrize("place", ["cache", "cache/tokens"])
def test_a_cache_folder_that_cannot_be_written_is_one_clear_error(place, data, tokenizer, cache_dir, tmp_path):
    in_the_way = tmp_path / place
    in_the_way.parent.mkdir(exist_ok=True)
    in_the_way.write_text("a file where a folder belongs")
    with pytest.raises(DataError, match=f"cannot be written to {cache_dir / 'tokens'}: .+"):
        build(data, tokenizer, cache_dir)


def test_a_full_disk_is_one_clear_error(data, tokenizer, cache_dir, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_sync", full)
    with pytest.raises(DataError, match="cannot be written .*: No space left on device"):
        build(data, tokenizer, cache_dir)
    assert left_behind(cache_dir) == ["tokens"]


def test_a_slow_tokenizer_is_refused_by_name(data, cache_dir):
    with pytest.raises(ModelError, match="ByT5Tokenizer .* use a fast tokenizer"):
        build(data, ByT5Tokenizer(), cache_dir)


# Truncation


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Lengths for a limit of 40: fits; too long in its response; fits; too long in its prompt already."""
    long = "USER: ASSISTANT: " * 30
    records = [RECORDS[0], {"prompt": "Hi", "response": long}, RECORDS[3], {"prompt": long, "response": "Hi"}]
    return write(tmp_path / "mixed.json", records)


def test_drop_leaves_out_what_is_too_long(mixed, tokenizer, cache_dir):
    store = build(mixed, tokenizer, cache_dir, max_length=40)
    whole = encoded(tokenizer, mixed)
    assert examples(store) == [whole[0], whole[2]]
    report = store.report
    assert (report.records, report.examples, report.too_long, report.without_target) == (4, 2, 2, 0)
    assert report.longest == max(len(ids) for ids, _ in whole)
    assert report.tokens == len(whole[0][0]) + len(whole[2][0])


def test_right_cuts_ids_and_mask_and_leaves_out_what_then_has_no_target(mixed, tokenizer, cache_dir):
    store = build(mixed, tokenizer, cache_dir, max_length=40, truncation="right")
    whole = encoded(tokenizer, mixed)
    assert examples(store) == [whole[0], (whole[1][0][:40], whole[1][1][:40]), whole[2]]
    report = store.report
    assert (report.records, report.examples, report.too_long, report.without_target) == (4, 3, 2, 1)
    assert report.longest == max(len(ids) for ids, _ in whole)
    assert report.supervised == store.supervised.sum()


@pytest.mark.parametrize("max_length", range(5, 30))
def test_right_never_leaves_an_example_without_a_supervised_token(max_length, mixed, tokenizer, cache_dir):
    targets = [mask[:max_length] for _, mask in encoded(tokenizer, mixed) if any(mask[:max_length])]
    if not targets:
        with pytest.raises(DataError):
            build(mixed, tokenizer, cache_dir, max_length=max_length, truncation="right")
        return
    store = build(mixed, tokenizer, cache_dir, max_length=max_length, truncation="right")
    assert [mask for _, mask in examples(store)] == targets
    assert store.supervised.min() > 0 and store.lengths.max() <= max_length
    assert store.report.without_target == 4 - len(targets)


def test_error_names_the_first_record_that_is_too_long(mixed, tokenizer, cache_dir):
    length = len(encoded(tokenizer, mixed)[1][0])
    with pytest.raises(DataError, match=f"mixed.json, record 2: {length} tokens.*max_length=40.*MAX_LENGTH"):
        build(mixed, tokenizer, cache_dir, max_length=40, truncation="error")
    assert left_behind(cache_dir) == ["tokens"]


@pytest.mark.parametrize("truncation", ["drop", "right", "error"])
def test_an_example_of_just_the_limit_is_not_too_long(truncation, mixed, tokenizer, cache_dir):
    whole = encoded(tokenizer, mixed)
    longest = max(len(ids) for ids, _ in whole)
    store = build(mixed, tokenizer, cache_dir, max_length=longest, truncation=truncation)
    assert examples(store) == whole
    assert store.report.too_long == 0


@pytest.mark.parametrize("truncation", ["drop", "right"])
def test_where_all_are_too_long_the_error_says_how_many_how_long_and_what_to_set(
    truncation, data, tokenizer, cache_dir
):
    longest = max(len(ids) for ids, _ in encoded(tokenizer, data))
    with pytest.raises(DataError) as caught:
        build(data, tokenizer, cache_dir, max_length=4, truncation=truncation)
    message = str(caught.value)
    for part in ("data.json", "all 4 examples", "max_length=4 ", f"longest has {longest}", f"MAX_LENGTH to {longest}"):
        assert part in message
    assert ("truncation=right" in message) == (truncation == "drop")
    assert left_behind(cache_dir) == ["tokens"]
    assert len(build(data, tokenizer, cache_dir, max_length=longest)) == 4


def test_data_without_a_supervised_token_is_refused(data, tokenizer, cache_dir, monkeypatch):
    """No template does that by itself: the renderer refuses those that mark nothing."""
    encode_batch = Renderer.encode_batch

    def unmasked(renderer, conversations):
        return [replace(item, loss_mask=[0] * len(item.loss_mask)) for item in encode_batch(renderer, conversations)]

    monkeypatch.setattr(Renderer, "encode_batch", unmasked)
    with pytest.raises(DataError, match="data.json: no token is supervised in any of the 4 records"):
        build(data, tokenizer, cache_dir)
    assert left_behind(cache_dir) == ["tokens"]


# Several processes


@pytest.fixture
def many(tmp_path) -> Path:
    """Records of very different lengths, so that workers finish out of order."""
    records = [{"prompt": f"What is {n}?", "response": f"{n} is fine. " * (1 + 37 * n % 61)} for n in range(60)]
    return write(tmp_path / "many.json", records)


@pytest.fixture
def pools(monkeypatch) -> list[int]:
    """Processes pay from nine records on; the list holds the number of workers of each pool that was started."""
    monkeypatch.setattr(encode, "CHUNK", 3)
    monkeypatch.setattr(encode, "IN_PROCESS", 3)
    started: list[int] = []
    pool = encode.ProcessPoolExecutor

    def counting(workers, *args):
        started.append(workers)
        return pool(workers, *args)

    monkeypatch.setattr(encode, "ProcessPoolExecutor", counting)
    return started


def test_several_processes_write_the_same_bytes_as_one(many, tokenizer, tmp_path, pools):
    one = build(many, tokenizer, tmp_path / "one", workers=1, max_length=300)
    assert pools == []
    several = build(many, tokenizer, tmp_path / "several", workers=2, max_length=300)
    assert pools == [2]
    assert 0 < one.report.too_long < 60
    for name in FILES:
        assert (one.folder / name).read_bytes() == (several.folder / name).read_bytes(), name


def test_few_records_start_no_processes(data, tokenizer, cache_dir, pools):
    build(data, tokenizer, cache_dir, workers=2)
    assert pools == []


def test_what_a_worker_raises_is_told_as_if_there_were_none(many, cache_dir, pools, monkeypatch):
    refusing = "{% if '41' in messages[0]['content'] %}{{ raise_exception('no 41') }}{% endif %}" + tiny.CHATML
    with pytest.raises(DataError, match="many.json, record 42.*no 41"):
        build(many, tiny.build_tokenizer(refusing), cache_dir, workers=2)
    assert pools == [2]
    assert left_behind(cache_dir) == ["tokens"]


def test_two_builds_at_once_both_end_with_a_whole_store(data, tokenizer, cache_dir, monkeypatch):
    """Each waits for the other with its build all but done, so that both publish the same store."""
    fork = get_context("fork")
    meeting, fingerprints = fork.Barrier(2), fork.Queue()
    check = cache._check

    def check_together(*args):
        check(*args)
        meeting.wait(timeout=600)

    def build_and_tell():
        store = build(data, tokenizer, cache_dir)
        fingerprints.put((store.fingerprint, examples(store)))

    monkeypatch.setattr(cache, "_check", check_together)
    builders = [fork.Process(target=build_and_tell) for _ in range(2)]
    for builder in builders:
        builder.start()
    first, second = (fingerprints.get(timeout=600) for _ in builders)
    for builder in builders:
        builder.join(timeout=600)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert first == second
    assert first[1] == encoded(tokenizer, data)
    assert len(stores(cache_dir)) == 1


# Bad records


BAD = [
    {"prompt": "Hi", "response": ""},
    {"prompt": "Hi", "response": 3},
    {"messages": [{"role": "robot", "content": "a"}]},
]


def test_the_first_bad_record_stops_and_others_are_shown_with_it(tokenizer, cache_dir, tmp_path):
    path = write(tmp_path / "a.json", [RECORDS[0], *BAD, *RECORDS])
    with pytest.raises(DataError) as caught:
        build(path, tokenizer, cache_dir)
    first, others, *lines, hint = str(caught.value).splitlines()
    assert "record 2: response is an empty response" in first and others == "Nor can 2 other records be used:"
    assert "record 3: response is a number" in lines[0] and "record 4: messages[0].role is 'robot'" in lines[1]
    assert "data.on_bad_record=skip" in hint and len(lines) == 2


def test_no_more_than_twenty_others_are_shown(tokenizer, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK", 8)
    with pytest.raises(DataError) as caught:
        build(write(tmp_path / "a.json", BAD * 30), tokenizer, cache_dir)
    lines = str(caught.value).splitlines()
    assert lines[1] == "Nor can more than 20 other records be used:" and len(lines) == 23


def test_looking_on_ends_some_time(tokenizer, cache_dir, tmp_path, monkeypatch):
    """After 10,000 good records, here 8: an error need not wait for the end of a long file."""
    monkeypatch.setattr(encode, "CHUNK", 4)
    monkeypatch.setattr(cache, "LOOK_ON", 8)
    read = []
    admit = encode._admit
    monkeypatch.setattr(encode, "_admit", lambda *args: [read.append(args[0]), admit(*args)][1])
    with pytest.raises(DataError, match="record 1: "):
        build(write(tmp_path / "a.json", [BAD[0], *RECORDS * 10]), tokenizer, cache_dir)
    assert len(read) <= 16


def test_skipped_records_are_counted_by_kind_and_written_down(tokenizer, cache_dir, tmp_path):
    refusing = "{% if 'no' == messages[0]['content'] %}{{ raise_exception('never') }}{% endif %}" + tiny.CHATML
    tokenizer.chat_template = refusing
    path = write(tmp_path / "a.json", [*BAD, *RECORDS, {"prompt": "no", "response": "yes"}, BAD[0]])
    store = build(path, tokenizer, cache_dir, on_bad_record="skip")
    assert store.report.rejected == {"empty": 2, "type": 1, "roles": 1, "template": 1}
    assert store.report.kinds == "2 empty, 1 roles, 1 template, 1 type"
    assert (store.report.records, store.report.examples) == (9, 4)
    rows = [json.loads(line) for line in (store.folder / "rejected.jsonl").read_text().splitlines()]
    assert [row["record"] for row in rows[:3]] == BAD and rows[4]["record"] == BAD[0]
    assert rows[3]["record"]["messages"][0] == {"role": "user", "content": "no"}
    assert "never" in rows[3]["reason"] and "record 8" in rows[3]["reason"]
    assert examples(store) == encoded(tokenizer, write(tmp_path / "good.json", RECORDS))


def test_a_file_that_cannot_be_read_on_is_never_skipped(tokenizer, cache_dir, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS)[:-1])
    with pytest.raises(DataError, match="malformed JSON"):
        build(path, tokenizer, cache_dir, on_bad_record="skip")


def test_nothing_but_bad_records(tokenizer, cache_dir, tmp_path):
    with pytest.raises(DataError, match=r"none of the 3 records can be used \(1 empty, 1 roles, 1 type\)"):
        build(write(tmp_path / "a.json", BAD), tokenizer, cache_dir, on_bad_record="skip")


def test_a_column_that_no_record_has_stops_the_build(data, tokenizer, cache_dir):
    with pytest.raises(DataError, match="system is to be 'sys', which no record has"):
        build(data, tokenizer, cache_dir, columns={"system": "sys"})


# What is counted


def test_examples_are_counted_by_file_and_equal_ones_have_equal_digests(data, tokenizer, cache_dir, tmp_path):
    other = write(tmp_path / "b.json", [RECORDS[1], {"prompt": "1 2 3", "response": "4 5 6 " * 90}, RECORDS[1]])
    store = build([data, other], tokenizer, cache_dir, max_length=150)
    assert store.report.examples_of_files == [4, 2]
    groups = [ids for ids, _ in examples(store)]
    for one in range(6):
        for two in range(6):
            assert (store.digests[one] == store.digests[two]) == (groups[one] == groups[two])


def test_special_text_is_counted(tokenizer, cache_dir, tmp_path):
    records = [*RECORDS, {"prompt": "What is <|im_end|>?", "response": "A token."}]
    assert build(write(tmp_path / "a.json", records), tokenizer, cache_dir).report.special_text == 1


def test_thoughts_that_the_template_hides_are_counted(cache_dir, tmp_path):
    forgetful = tiny.CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    records = [*RECORDS, {"prompt": "Hi", "response": "<think>hm</think>Hello."}]
    store = build(write(tmp_path / "a.json", records), tiny.build_tokenizer(forgetful), cache_dir)
    assert (store.report.dropped_reasoning, store.report.examples) == (1, 5)


def test_parts_of_a_store_have_fingerprints_of_their_own(data, tokenizer, cache_dir):
    store = build(data, tokenizer, cache_dir)
    parts = [Examples(store, np.array(numbers)).fingerprint for numbers in ([0, 1, 2, 3], [0, 1, 2], [0, 0, 1, 2, 3])]
    assert len(set(parts)) == 3 and parts[0] == Examples(store, np.arange(4)).fingerprint


# Killed builds


def test_a_killed_build_leaves_nothing_that_is_believed_and_the_next_removes_it(many, tokenizer, cache_dir):
    """SIGKILL after each of the writes of a build."""
    fork = get_context("fork")
    sync = cache._sync
    for at in range(6):
        calls = iter(range(10))

        def dying(file, at=at, calls=calls):
            sync(file)
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def run(dying=dying):
            cache._sync = dying
            build(many, tokenizer, cache_dir)

        process = fork.Process(target=run)
        process.start()
        process.join(timeout=600)
        assert process.exitcode == -signal.SIGKILL
        assert len([name for name in stores(cache_dir) if "partial" in name]) == 1
    assert examples(build(many, tokenizer, cache_dir)) == encoded(tokenizer, many)
    assert len(stores(cache_dir)) == 1


def test_a_build_that_goes_on_is_left_alone(data, tokenizer, cache_dir, tmp_path, monkeypatch):
    """Another store is built, by another process as far as locks can tell, in the middle of this one."""
    other = write(tmp_path / "b.json", RECORDS[:2])
    check = cache._check

    def check_while_another_builds(*args):
        monkeypatch.setattr(cache, "_check", check)
        build(other, tokenizer, cache_dir)
        check(*args)

    monkeypatch.setattr(cache, "_check", check_while_another_builds)
    assert examples(build(data, tokenizer, cache_dir)) == encoded(tokenizer, data)
    assert len(stores(cache_dir)) == 2


def test_a_worker_that_is_killed_is_one_clear_error(many, tokenizer, cache_dir, pools, monkeypatch):
    monkeypatch.setattr(encode, "_admit", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="a process that tokenises was killed.*data.num_workers=1"):
        build(many, tokenizer, cache_dir, workers=2)
    assert left_behind(cache_dir) == ["tokens"]


def test_workers_die_with_the_process_that_builds(many, tokenizer, cache_dir, pools, monkeypatch):
    """They would wait for work for ever, and hold the lock of the unfinished store."""
    fork = get_context("fork")
    workers = fork.Queue()

    def report(*_):
        workers.put(os.getpid())
        time.sleep(600)

    def run():
        monkeypatch.setattr(encode, "_admit", report)
        build(many, tokenizer, cache_dir, workers=2)

    process = fork.Process(target=run)
    process.start()
    found = {workers.get(timeout=600), workers.get(timeout=600)}
    assert process.pid not in found
    process.kill()
    process.join(timeout=600)
    end = time.monotonic() + 600
    while any(map(is_alive, found)) and time.monotonic() < end:
        time.sleep(0.05)
    left = [pid for pid in found if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
