"""Check the conventions of the repository: its words, the length of its files and functions, and its docstrings.

python -m tests.test_conventions [ROOT] prints every violation, grouped by file.
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Phrases: regular expressions that ignore case; a space matches any white space, also across lines of a comment.
PHRASES = [
    r"\btold\b",
    r"\btells\b",
    r"\blearnt\b",
    r"\bspelt\b",
    r"\bof which\b",
    r"\bby lot\b",
    r"\bwithout a word\b",
    r"\bat its word\b",
    r"\bfor want of\b",
    r"\bkeeps? apart\b",
    r"\bsees? each other\b",
    r"\bof its own\b",
    r"\bstands? (?:in|there|beside|below|above|at|on)\b",
    r"\bwhat is said\b",
    r"\b(?:can|could|may|to) be had\b",
    r"\bhalf up to\b",
    r"\bnot even weights\b",
    r"\bmeeting place\b",
    r"\bmeeting of (?:the )?ranks\b",
    r"\bspeaks? for\b",
    r"\blast words\b",
    r"\bgoodbye\b",
    r"<{7}",  # of a merge that was not finished
    r"\bthereof\b|\bwherein\b|\bwhereof\b|\bwhilst\b|\bamongst\b|\bhitherto\b|\bnought\b",
]

# British spellings, as words or as parts of identifiers.
_ISE = (
    "optim token initial recogn normal serial organ summar quant general synchron material minim maxim parallel vector "
    "custom util special memor emphas penal factor character priorit standard visual regular local random final"
)
SPELLINGS = [
    rf"(?:{'|'.join(_ISE.split())})is(?:e|es|ed|er|ers|ing|ation|ations|able)(?!(?-i:[a-z]))",
    r"colour|behaviour|favour|neighbour|honour(?!able)|(?<![a-z])labour",
    r"(?<![a-z])(?:centred?|licence|catalogue|programme|defence)s?(?![a-z])",
    r"(?<![a-z])analys(?:e|ed|ing)(?![a-z])|(?<![a-z])(?:un)?labelled(?![a-z])",
]

# Identifiers of the old dialect, banned wherever they occur as a word. See `EXEMPT` for the two old keys.
IDENTIFIERS = """
meeting_place speaks_for_machine record_end is_alone _is_alone ending_all go_on FIRST_SILENCE SILENCE BEAT _Heard _obey
STOPPED of_layer of_ends problem_of _set_aside _retire check_agreement choose_checkpointing _together _on_first
WholeModel GradientSum clip_whole holds_whole_model share_beginnings keep_inputs_only or_itself _Once return_loss
_keeps_apart _loss_of_third find_model_class_quickly hides_thought looked_for kind_of step_examples
share_one_heap _unsaid _quieten hand_on take_on preview_page preview_text platform_cpu
allow_special_text hang_timeout
"""

# Ordinary words: banned as the name of a class or function, or as an attribute.
CLASSES = "Shape Layout Plan Requests Watch Saving Survey Shaper Said Prepared Meeting Room Lean Rejected"
FUNCTIONS = "resident mixture located thought note _tell _follow gathered agree said told"
ATTRIBUTES = "wanted held"

# Modules that have moved, by their old paths.
MODULES = {
    "": "compose flops lean memory models preflight prepare_data preview_data processes room",
    "training": "agree checkpoint evaluate lock manifest meeting prepare progress room save_model saving shape "
    "stop watch",
    "data": "batches cache containers encode files guard plan preview_page preview_text template tokens",
    "engine": "adapters blockwise elementwise engine flash packs platform_cpu whole",
}

# Files with text for models, or that quote the old words: path or folder -> what may occur ("*" for everything).
OLD_KEYS = {"allow_special_text", "hang_timeout", "${either:"}
EXEMPT = {
    "CHANGELOG.md": {"*"},
    "LICENSE": {"*"},
    "data/": {"*"},
    "tests/test_conventions.py": {"*"},
    "sft_recipe/config/compose.py": OLD_KEYS,
    "sft_recipe/config/aliases.py": OLD_KEYS,
    "tests/config/test_compose.py": OLD_KEYS,
    "tests/config/test_aliases.py": OLD_KEYS,
    "tests/config/test_recipes.py": OLD_KEYS,
}


def _word_pattern() -> re.Pattern[str]:
    gap = r"(?:[ \t]|\n[ \t#*>|]*)+"
    phrases = [phrase.replace(" ", gap) for phrase in PHRASES]
    return re.compile("|".join(f"(?:{pattern})" for pattern in phrases + SPELLINGS), re.IGNORECASE)


def _name_pattern() -> re.Pattern[str]:
    names = [
        rf"(?<![\w])(?:{'|'.join(IDENTIFIERS.split())})(?!\w)",
        rf"\bclass (?:{'|'.join(CLASSES.split())})\b",
        rf"\bdef (?:{'|'.join(FUNCTIONS.split())})\b",
        rf"(?<=[\w)\]])\.(?:{'|'.join(ATTRIBUTES.split())})\b(?!\s*\()",
        r"\$\{either:",
    ]
    for package, modules in MODULES.items():
        names_of_package = modules.replace(" ", "|")
        folder = f"{package}/" if package else ""
        dotted = f"{package}\\." if package else ""
        names.append(rf"\bsft_recipe/{folder}(?:{names_of_package})\.py\b")
        if package:
            names.append(rf"(?<![\w/])(?:{package})/(?:{names_of_package})\.py\b")
            names.append(rf"\bsft_recipe\.{dotted}(?:{names_of_package})\b")
            names.append(rf"\bfrom sft_recipe\.{package} import (?:\w+, )*(?:{names_of_package})\b")
    return re.compile("|".join(names), re.MULTILINE)


WORDS, NAMES = _word_pattern(), _name_pattern()


def tracked_files(root: Path) -> dict[str, str]:
    """Return path and text of every text file that git tracks (or would track) below `root`."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    texts = {}
    for name in sorted(filter(None, names)):
        try:
            texts[name] = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
    return texts


def banned_words(files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield path and message for every phrase, spelling and identifier of the old dialect."""
    for path, text in files.items():
        allowed = EXEMPT.get(path, EXEMPT.get(f"{path.split('/')[0]}/", set()))
        if "*" in allowed:
            continue
        for pattern in (WORDS, NAMES):
            for match in pattern.finditer(text):
                found = " ".join(re.sub(r"[#*>|]", " ", match.group()).split())
                if found not in allowed:
                    yield path, f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {found!r}"


def long_code(files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield path and message for every Python file over 400 lines and every function over 60."""
    for path, text in files.items():
        if not path.endswith(".py"):
            continue
        lines = text.count("\n")
        if lines > MAX_FILE_LINES:
            yield path, f"{path}: {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    yield path, f"{path}:{node.lineno}: {node.name} has {length} lines"


# A first sentence that begins so is a fragment; the second group is one unless a main clause follows (after a comma).
FRAGMENT = re.compile(
    r"(?:Of|Whether|How|Why|Who|Whose)\b|(?:With|Without|As|In place of|Where|When)\b(?!.*,)", re.DOTALL
)
NOUN_PHRASE = re.compile(
    r"(?:The|An?|Each|Every|All|One|Two|Those|That|This|These|Its?|No|Some|Many|[A-Z]?[a-z]+s of)\b"
)
VERB = re.compile(
    r"\b(?:is|are|was|were|be|been|has|have|had|do|does|did|can|may|must|will|would|could|might|should|needs?|"
    r"holds?|contains?|returns?|yields?|raises?|reads?|writes?|keeps?|gives?|takes?|makes?|gets?|goes|go|comes?|"
    r"uses?|used|runs?|starts?|stops?|ends?|saves?|loads?|sets?|shows?|says?|prints?|reports?|lists?|names?|counts?|"
    r"computes?|trains?|tests?|checks?|builds?|creates?|finds?|knows?|wants?|waits?|works?|fits?|differs?|depends?|"
    r"behaves?|applies|apply|describes?|represents?|maps?|turns?|converts?|records?|stores?|tracks?|follows?|begins?|"
    r"forwards?|handles?|wraps?|sends?|receives?|splits?|joins?|adds?|drops?|packs?|produces?|belongs?|lies|lie|"
    r"calls?|causes?|stays?|remains?|fails?|exits?|lets?|allows?|means?|moves?|looks?|measures?|collects?|replaces?|"
    r"\w+ed)\b",
    re.IGNORECASE,
)


def docstring_problem(docstring: str | None) -> str | None:
    """Return what is wrong with the first sentence of a docstring, or None."""
    if not docstring:
        return "has no docstring"
    paragraph = docstring.strip().split("\n\n")[0].strip()
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    if not re.search(r"[.:!?][)'\"`]?$", sentence):
        return f"first sentence does not end with a period: {sentence[:60]!r}"
    verbs = len(VERB.findall(sentence))
    too_few = verbs < 2 if sentence.startswith("What ") else verbs < 1 and NOUN_PHRASE.match(sentence)
    if too_few or FRAGMENT.match(sentence):
        return f"docstring has no verb: {sentence[:70]!r}"
    return None


def weak_docstrings(files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield path and message for every module without a docstring, and every public name whose docstring is weak."""
    for path, text in files.items():
        if not path.endswith(".py") or not text.strip():
            continue
        tree = ast.parse(text)
        if not ast.get_docstring(tree):
            yield path, f"{path}: the module has no docstring"
        if path.startswith("sft_recipe/"):
            for node in _public(tree):
                if problem := docstring_problem(ast.get_docstring(node)):
                    yield path, f"{path}:{node.lineno}: {node.name} {problem}"


def _public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield public classes and functions, and the public methods of public classes that override nothing."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef) and not node.bases:
                yield from _public(node)


CHECKS = {"words": banned_words, "length": long_code, "docstrings": weak_docstrings}


@pytest.mark.parametrize("check", CHECKS)
def test_repository_follows_conventions(check):
    violations = [message for _, message in CHECKS[check](tracked_files(ROOT))]
    assert not violations, "\n".join([f"{len(violations)} violations", *violations])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the user is told", ["told"]),
        ("a file, of\n    # which half", ["of which"]),
        ("OptimiserState and tokeniser", ["Optimiser", "tokeniser"]),
        ("meeting_place()", ["meeting_place"]),
        ("class Shape:", ["class Shape"]),
        ("shape = tensor.shape; plan = cache.stop()", []),
        ("see training/stop.py", ["training/stop.py"]),
        ("from sft_recipe.data import cache", ["from sft_recipe.data import cache"]),
        ("allow_special_text", ["allow_special_text"]),
    ],
)
def test_old_words_are_found(text, found):
    messages = [message for _, message in banned_words({"file.py": text})]
    assert [message.split(": ", 1)[1].strip("'") for message in messages] == found


@pytest.mark.parametrize(
    ("docstring", "good"),
    [
        ("Return the rows of a file.", True),
        ("The rows are those of the file.", True),
        ("The rows of the file.", False),
        ("Of a file, its rows.", False),
        ("Return the rows", False),
        (None, False),
    ],
)
def test_fragments_are_not_sentences(docstring, good):
    assert (docstring_problem(docstring) is None) == good


def main() -> int:
    """Print all violations by file; return 1 where there are any."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    by_file = defaultdict(list)
    for check in CHECKS.values():
        for path, message in check(tracked_files(root)):
            by_file[path].append(message)
    for path in sorted(by_file):
        print(f"\n{path} ({len(by_file[path])})")
        print("\n".join(f"    {message}" for message in by_file[path]))
    return 1 if by_file else 0


if __name__ == "__main__":
    sys.exit(main())
