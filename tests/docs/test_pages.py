"""README and docs name commands, flags, settings, files and functions that exist, and show the recorded figures."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import segjax
from segjax.__main__ import COMMANDS, main
from segjax.commands import train
from segjax.models import MODELS, settings
from segjax.train import schema

ROOT = Path(segjax.__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "parity/README.md", "benchmarks/README.md"]
PAGES += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name != "tables"]
GENERATED = {"docs/command_line.md", "docs/settings.md", "docs/published_weights.md"}
WRITTEN = [page for page in PAGES if page not in GENERATED]

MODEL_SETTINGS = {f"model.{name}" for model in MODELS for name in settings(model)} | {"model.in_channels"}
# Flags in the text that belong to SLURM, TensorRT's trtexec, MLflow and XLA.
OTHER_FLAGS = {"--gpus-per-task", "--gpu-bind", "--fp16", "--backend-store-uri", "--xla_disable_hlo_passes"}
SUFFIXES = ("csv", "html", "json", "jsonl", "md", "png", "py")
SETTINGS = {*schema.SETTINGS, *MODEL_SETTINGS}


def blocks(page, language):
    """The code blocks of one language, with their first line's number."""
    text = (ROOT / page).read_text("utf-8")
    for found in re.finditer(r"^```(\S*)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if found[1] == language:
            yield text[: found.start()].count("\n") + 2, found[2]


def commands(page):
    """The words of every command in shell blocks and in cells of tutorials, with its line's number."""
    text = (ROOT / page).read_text("utf-8")
    for inline in re.finditer(r"`((?:segjax|python -m|python train\.py) [^`]*)`", text):
        with contextlib.suppress(ValueError):
            yield text[: inline.start()].count("\n") + 1, shlex.split(inline[1])
    for language in ("bash", "{code-cell}"):
        yield from _commands_of(page, language)


def _commands_of(page, language):
    for start, block in blocks(page, language):
        if language == "{code-cell}" and not block.startswith("%%sh\n"):
            continue
        joined = re.sub(r"\\\n", lambda _: "  ", block)
        for offset, line in enumerate(joined.splitlines()):
            if line == "%%sh":
                continue
            with contextlib.suppress(ValueError):
                words = shlex.split(line, comments=True)
                for part in " ".join(map(shlex.quote, words)).split("'&&'"):
                    yield start + offset, shlex.split(part)


@functools.cache
def help_of(*command):
    if command[0] == "segjax":
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            main([*command[1:], "--help"])
        return printed.getvalue()
    done = subprocess.run([sys.executable, "-m", *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout


def segjax_command(words):
    """The command and its arguments of `segjax X ...`, `python -m segjax.X ...` or `python train.py ...`; else None."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:1] == ["srun"]:
        words = words[words.index("segjax") :]
    if words[:2] == ["python", "train.py"]:
        return "train", words[2:]
    if words[:2] == ["python", "-m"] and words[2].startswith("segjax."):
        return words[2].removeprefix("segjax."), words[3:]
    return (words[1], words[2:]) if words[:1] == ["segjax"] and len(words) > 1 else None


def test_the_readme_has_at_most_1200_words():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1200


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_in_pages_exist_with_their_flags(page):
    for line, words in commands(page):
        found = segjax_command(words)
        if found is None:
            continue
        command, arguments = found
        where = f"{page}:{line}: {' '.join(words)}"
        if command.startswith("-"):
            assert command in ("--help", "--version"), where
            continue
        assert command in COMMANDS, where
        subcommand = [arguments[0]] if command == "data" and arguments[0] in ("show", "import") else []
        known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of("segjax", command, *subcommand))) | {"--help"}
        for flag in (word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)):
            if flag.startswith("--config.") and command == "train":
                assert flag.removeprefix("--config.") in SETTINGS, f"{where}: no setting {flag}"
            else:
                assert flag in known or flag.removeprefix("--") in train.FLAGS, f"{where}: no flag {flag}"


@pytest.mark.parametrize("page", WRITTEN)
def test_recipes_in_pages_exist(page):
    for name, words in re.findall(r"--config[ =]([a-z_]+):([\w,-]+)", (ROOT / page).read_text("utf-8")):
        recipe = importlib.import_module(f"segjax.recipes.{name}")
        assert words.partition(",")[0] in recipe.VARIANTS, f"{page}: {name}:{words}"


@pytest.mark.parametrize("page", WRITTEN)
def test_settings_in_pages_exist(page):
    text = (ROOT / page).read_text("utf-8")
    sections = "|".join(section.name for section in schema.SECTIONS if section.name)
    inline = re.findall(rf"`(?:--config\.)?((?:{sections})\.[a-z_0-9]+)(?:=[^`]*)?`", text)
    inline += re.findall(rf"--config\.((?:{sections})\.[a-z_0-9]+)", text)
    files = {"data.json", "train.py", "data.yaml"}
    assert {name for name in inline if name not in files} <= SETTINGS, page


@pytest.mark.parametrize("page", WRITTEN)
def test_files_and_modules_in_pages_exist(page):
    text = (ROOT / page).read_text("utf-8")
    for path in re.findall(r"`((?:segjax|parity|tests|benchmarks|configs|docs|examples|\.ci)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{page}: {path}"
    for module in re.findall(r"python -m ((?:segjax|parity|benchmarks|tests)[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{page}: {module}"


@pytest.mark.parametrize("page", WRITTEN)
def test_functions_in_pages_exist(page):
    text = (ROOT / page).read_text("utf-8")
    for name in re.findall(r"`(segjax(?:\.\w+)+)(?:\([^`]*\))?`", text):
        value = segjax
        for part in name.split(".")[1:]:
            if not hasattr(value, part):
                assert importlib.util.find_spec(f"{value.__name__}.{part}"), f"{page}: {name}"
                value = importlib.import_module(f"{value.__name__}.{part}")
            else:
                value = getattr(value, part)


@functools.cache
def every_flag():
    """The flags of all commands, and those of the programs in `parity`, `benchmarks` and `tests`."""
    texts = [help_of("segjax", name) for name in COMMANDS]
    texts += [help_of("segjax", "data", name) for name in ("show", "import")]
    folders = ("parity", "benchmarks", "tests")
    texts += [path.read_text("utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}


@pytest.mark.parametrize("page", WRITTEN)
def test_flags_in_the_text_of_pages_exist(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for flag in re.findall(r"`(--[a-z][\w-]*)(?![\w.-])[^`]*`", text):
        known = flag in every_flag() | OTHER_FLAGS or flag.removeprefix("--") in train.FLAGS
        assert known, f"{page}: {flag}"


@functools.cache
def modules():
    """Modules of segjax by their last name; None if several share it."""
    found = {}
    for path in (ROOT / "segjax").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        last = name.rpartition(".")[2]
        found[last] = None if last in found else name
    return found


@pytest.mark.parametrize("page", WRITTEN)
def test_names_of_modules_in_the_text_of_pages_exist(page):
    text = (ROOT / page).read_text("utf-8")
    for module, name in re.findall(r"`(\w+)\.(\w+)(?:\(\))?`", text):
        if f"{module}.{name}" in SETTINGS or name in SUFFIXES or not modules().get(module):
            continue
        found = importlib.import_module(modules()[module])
        assert hasattr(found, name), f"{page}: {module}.{name}"
    for names, path in re.findall(r"((?:`\w+`(?:, | and | or )?)+) (?:in|of) `([\w/.]+\.py)`", text):
        files = [ROOT / path] if "/" in path else (ROOT / "segjax").rglob(path)
        words = {word for file in files for word in re.findall(r"\w+", file.read_text("utf-8"))}
        assert set(re.findall(r"`(\w+)`", names)) <= words, f"{page}: {names} {path}"


@pytest.mark.parametrize("page", PAGES)
def test_links_in_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        path, _, anchor = target.partition("#")
        if re.match(r"https?://", target):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        known = file.exists() or str(file.resolve().relative_to(ROOT)) in GENERATED
        assert known, f"{page}: {target}"
        if anchor and file.exists():
            titles = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", WRITTEN)
def test_pictures_in_pages_have_alternative_text(page):
    text = (ROOT / page).read_text("utf-8")
    assert "![](" not in text
    assert all('alt="' in tag for tag in re.findall(r"<img [^>]*>", text))


@pytest.mark.parametrize("page", WRITTEN)
def test_python_in_pages_can_be_parsed_and_imports_what_exists(page):
    cells = [(line, code) for line, code in blocks(page, "{code-cell}")]
    for line, code in [*blocks(page, "python"), *cells]:
        code = re.sub(r"\A(---\n.*?---\n|(:[\w-]+:[^\n]*\n)+)", "", code, flags=re.DOTALL)
        if code.startswith("%%sh\n"):
            continue
        for node in ast.walk(ast.parse(code, f"{page}:{line}")):
            names = [(node.module, alias.name) for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for module, name in names:
                if module and module.partition(".")[0] == "segjax":
                    imported = importlib.import_module(module)
                    assert hasattr(imported, name) or importlib.util.find_spec(f"{module}.{name}"), f"{page}:{line}"


# ---------------------------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def generated():
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def readme_rows(heading):
    section = (ROOT / "README.md").read_text("utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]], section


def test_the_readmes_table_of_speed_is_that_of_the_newest_record(generated):
    found = generated.record("speed-cpu")
    measured = {(model, work): ratios for model, work, _, *ratios in generated.speed_rows(found)}
    rows, section = readme_rows("Speed")
    assert len(rows) >= 4 and found["date"] in section
    for model, *ratios in rows:
        assert ratios == [*measured[model, "inference 1x512x512"], *measured[model, "training 2x256x256"]]


def test_the_readmes_table_of_errors_is_that_of_the_newest_record(generated):
    rows, _ = readme_rows("What is proven")
    assert rows == list(generated.proof_rows(generated.record("parity")))


def test_generated_pages_have_every_command_setting_and_published_weights(generated, tmp_path):
    generated.write(tmp_path)
    text = {path.name: path.read_text("utf-8") for path in tmp_path.rglob("*.md")}
    assert all(f"## segjax {name}\n" in text["command_line.md"] for name in COMMANDS)
    assert max(map(len, text["command_line.md"].splitlines())) <= 130
    assert all(f"\n`{key}`, default " in text["settings.md"] for key in schema.SETTINGS)
    assert all(f"| `{row.name}` |" in text["published_weights.md"] for row in segjax.list_weights())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.md")}
    generated.write(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.md")}
