"""What a user of the command line meets: help, mistakes, a narrow terminal, JSON, and what a folder is."""

from __future__ import annotations

import io
import json
import shlex

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

import sparse_hf
from sparse_hf.analysis import describe_stack
from sparse_hf.analysis.show import _shares
from sparse_hf.bench.plot import apart
from sparse_hf.bench.text import Figures
from sparse_hf.cli import app
from sparse_hf.cli.commands import BENCHES, COMMANDS
from sparse_hf.cli.evaluate import token_ids
from sparse_hf.cli.examples import EXAMPLES, paragraphs
from sparse_hf.cli.mistakes import flags, name_flags
from sparse_hf.pattern import Pattern, full
from sparse_hf.units import duration, size, times
from tests.models.families import dense_model
from tests.test_talk import tokenizer

NAMES = [*COMMANDS, *(f"bench {name}" for name in BENCHES)]


def invoke(*arguments) -> str:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).stdout


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example(name):
    for flag in ("-h", "--help"):
        assert "Example" in invoke(*name.split(), flag)


@pytest.mark.parametrize("name", NAMES)
def test_help_is_made_for_narrow_terminals(name, monkeypatch):
    """Examples stand on one line each, and lines of prose end where the terminal does."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in invoke(*name.split(), "--help").splitlines()]
    assert set(EXAMPLES[name]) <= set(lines)
    prose = " ".join(lines[2 : next(i for i, line in enumerate(lines) if line.startswith("╭"))])
    command = {**COMMANDS, **{f"bench {one}": made for one, made in BENCHES.items()}}[name]
    assert paragraphs(command).replace("\n\n", "  ") in prose


@pytest.mark.parametrize("example", [e for examples in EXAMPLES.values() for e in examples])
def test_examples_are_commands(example):
    words = shlex.split(example.partition(" < ")[0])[1:]
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    # reads all flags and arguments, and runs nothing
    command.make_context("sparse-hf", words)


def test_shells_complete_commands():
    assert "--install-completion" in invoke("--help")


def test_errors_name_flags():
    known = {"overwrite": "--overwrite", "max_length": "--max-length", "rope": "--rope", "as_json": "--json"}
    for message, right in (
        ("OUT is not empty; give another folder, or overwrite=True (--overwrite)", "OUT is not empty; give another folder, or --overwrite"),
        ("max_length is 3; it must be more", "--max-length is 3; it must be more"),
        ("rope is 'x'; leave rope out", "--rope is 'x'; leave --rope out"),
        ("nothing gets longer; give a max_length beyond 4", "nothing gets longer; give a --max-length beyond 4"),
        ("the folder's `max_length` and overwrite are words", "the folder's `max_length` and overwrite are words"),
    ):  # fmt: skip
        assert name_flags(message, known) == right


def test_flags_are_those_that_a_command_has():
    for name, command in {**COMMANDS, **BENCHES}.items():
        said = invoke(*(("bench", name) if command in BENCHES.values() else (name,)), "--help")
        # help cuts long names at narrow screens, and none of ours is long
        assert [flag for flag in flags(command).values() if flag not in said] == [], name
        assert ("--json" in flags(command).values()) == (name != "chat")


def test_flags_are_named_in_what_a_command_raises(tmp_path):
    with pytest.raises(ValueError, match=r"^--length is 0; it must be at least 1 token"):
        invoke("show", "first(1)", "--length", "0")
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    for command in ("evaluate", "tune"):
        with pytest.raises(ValueError, match="^--text is missing; give a file"):
            invoke(command, tmp_path / "dense", "--pattern", "first(1)")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    with pytest.raises(FileExistsError, match=r"give another folder, or --overwrite$"):
        invoke("convert", tmp_path / "dense", tmp_path / "out", "--pattern", "first(1)")


def test_dense_is_a_word_and_the_nearest_word_comes_first():
    assert Pattern.parse("dense") == full()
    with pytest.raises(ValueError, match=r"unknown word 'dens'; did you mean 'dense'\? A pattern of your own"):
        Pattern.parse("dens | first(1)")
    with pytest.raises(ValueError, match="unknown word 'qqqq'. The known words are .*causal, chunk, dense, "):
        Pattern.parse("qqqq(1)")


def test_list_fits_80_columns_and_tells_of_one_family(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, invoke("list").splitlines())) <= 80
    assert "SparseLlamaForCausalLM" in invoke("list", "llama") and "(derived)" in invoke("list", "jamba")
    assert json.loads(invoke("list", "sparse_llama", "--json"))["model_type"] == "sparse_llama"
    with pytest.raises(ValueError, match="'lama' is no family with a sparse counterpart; did you mean 'llama'"):
        invoke("list", "lama")


def test_tables_fit_narrow_terminals():
    table = Figures("title", ("", "1st call", "unused", "a token"))
    table.add("1,000 tokens", "sparse_hf, streaming", "1.20 s", "", "3.00 ms")
    table.fail("1,000 tokens", "dense, static", "out of memory")

    def shown(width: int) -> list[str]:
        console = Console(file=io.StringIO(), width=width)
        table.print(console)
        return console.file.getvalue().splitlines()

    assert shown(80) == [
        "title",
        "                      1st call  a token",
        "1,000 tokens",
        "sparse_hf, streaming    1.20 s  3.00 ms",
        "dense, static           failed",
        "dense, static, 1,000 tokens: out of memory",
    ]
    # figures below their names
    assert "sparse_hf, streaming" in shown(25) and max(map(len, shown(25))) <= 25


def test_figures_have_three_digits():
    assert [duration(s) for s in (None, 0.00271, 0.39, 14.23, 0.0000123)] == [
        "",
        "2.71 ms",
        "390 ms",
        "14.2 s",
        "12.3 us",
    ]
    assert [size(b) for b in (None, 640 << 10, 5 << 28)] == ["", "640 KiB", "1.25 GiB"] and times(1.6) == "1.60 x"


def test_names_of_lines_stand_apart():
    assert apart([], 10) == [] and apart([0, 100], 10) == [0, 100]
    assert apart([50, 50, 50], 10) == [40, 50, 60]
    found = apart([0, 4, 8, 100], 10)
    assert all(b - a >= 10 for a, b in zip(found, found[1:], strict=False)) and found[3] == 100


def test_a_picture_shows_a_line_of_one_token():
    """Of a long text: the first column and row, and nothing beside them."""
    shares = _shares(Pattern.parse("first(1)"), 40_000, 800, ())
    assert (shares[:, 0] > 0.5).all() and (shares[0] > 0.5).all() and not shares[1:, 1:].any()
    window = _shares(Pattern.parse("window(100, 0)"), 1600, 800, ())
    assert window[400, 380] == 1 and 0 < window[400, 350] < 1 and window[400, 340] == 0


@pytest.fixture(scope="module")
def sparse_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(20, 0) | first(4)", layers="0=dense").save_pretrained(
        folder
    )
    return folder


def test_info_tells_what_a_checkpoint_does(sparse_llama):
    found = json.loads(invoke("info", sparse_llama, "--json", "--length", "100"))
    (stack,) = found["stacks"]
    assert [(p["first"], p["last"], p["pattern"]) for p in stack["patterns"]][1] == (1, 1, "window(20, 0) | first(4)")
    # 5,050 pairs of all the past; a window of 21, and 4 sinks for those beyond it
    pairs = sum(min(i + 1, 21) + max(0, min(4, i - 20)) for i in range(100))
    assert stack["density"] == pytest.approx((5050 + pairs) / 2 / 100**2)
    right = describe_stack(["causal()", "(window(20, 0) | first(4)) & causal()"], 100)
    assert (stack["layers_to_reach"], stack["looks_ahead"]) == (right.layers, False)
    # keys and values of 2 heads of 8 in float32, 2 layers
    cache = found["cache"]
    assert cache["bytes_per_token"] == 2 * 2 * 2 * 8 * 4 and cache["bytes"] == 100 * cache["bytes_per_token"]
    assert cache["bytes"] / 2 < cache["streaming_bytes"] < cache["bytes"] and found["max_length"] == 512
    text = invoke("info", sparse_llama)
    assert "512 tokens (rotary positions)" in text and "with a streaming cache" in text
    shown = invoke("show", sparse_llama, "--length", "100")
    assert "█" in shown and "with a streaming cache" in shown
    assert json.loads(invoke("show", sparse_llama, "--length", "100", "--json")) == found


def test_info_of_what_is_dense_or_endless(tmp_path):
    dense_model("BertForMaskedLM").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="is dense .bert.; `sparse-hf convert"):
        invoke("info", tmp_path / "dense")
    sparse = sparse_hf.sparsify(dense_model("BertForMaskedLM"), "window(20, 20) | marked()", global_token_ids=[5])
    sparse.save_pretrained(tmp_path / "bert")
    text = " ".join(invoke("info", tmp_path / "bert", "--length", "100").split())
    assert "marked tokens: ids 5" in text and "there are 2, fewer" in text and "cache" not in text


def test_info_and_show_warn_as_convert_does(tmp_path):
    """Of what is not heard, of nothing global, of marks that nobody sets, and of texts longer than what was trained."""
    dense_model("BertForMaskedLM").save_pretrained(tmp_path / "dense")
    options = ("--pattern", "window(9, 9) | marked()", "--max-length", "1024")
    said = invoke("convert", tmp_path / "dense", tmp_path / "bert", *options, "--dry-run")
    invoke("convert", tmp_path / "dense", tmp_path / "bert", *options)
    sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(20, 0)").save_pretrained(tmp_path / "llama")
    notes = {name: json.loads(invoke("info", tmp_path / name, "--json"))["warnings"] for name in ("bert", "llama")}
    begins = {"bert": ("marked()", "the model was made for 512"), "llama": ("through", "nothing is global")}
    for name, found in notes.items():
        assert [note.startswith(one) for note, one in zip(found, begins[name], strict=True)] == [True, True], name
    assert all(" ".join(note.split()) in " ".join(said.split()) for note in notes["bert"])
    shown = " ".join(invoke("show", tmp_path / "llama", "--length", "100").split())
    assert "Note: through the model's 2 layers a token hears at most 40 tokens back, and texts may have 100" in shown
    told = " ".join(invoke("info", tmp_path / "bert", "--length", "2000").split())
    assert "Note: the table of positions ends at 1,024 tokens, and texts of 2,000 are refused" in told
    told = " ".join(invoke("info", tmp_path / "llama", "--length", "700").split())
    assert "Note: the model was made for 512 tokens and is to read 700" in told


def test_show_gives_numbers_as_json():
    found = json.loads(invoke("show", "chunk(10)", "stride(10)", "--length", "100", "--json"))
    assert [one["pairs"] for one in found["patterns"]] == [1000, 1000] and found["together"]["layers"] == 2


def test_tokens_are_named_by_their_texts(tmp_path):
    dense_model("BertForMaskedLM").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    given = (
        "convert",
        tmp_path / "dense",
        tmp_path / "out",
        "--pattern",
        "window(9, 9) | marked()",
        "--global-token-ids",
    )
    told = invoke(*given, "<s>,w7,9")
    assert sparse_hf.FAMILIES["bert"].config_class.from_pretrained(tmp_path / "out").global_token_ids == [1, 7, 9]
    assert f"after `import sparse_hf` it loads with AutoModelForMaskedLM.from_pretrained('{tmp_path / 'out'}')" in told
    with pytest.raises(
        ValueError, match=r"--global-token-ids has '\[CLS\]', which is no token of .*; its special tokens are '<s>'"
    ):
        invoke(*given, "[CLS]", "--overwrite")
    # as `evaluate` does
    assert token_ids("<s>,w7,9", str(tmp_path / "dense")) == (1, 7, 9) and token_ids("", "nowhere") == ()
    text = tmp_path / "text"
    text.write_text("w7 " * 99)
    with pytest.raises(ValueError, match=r"--global-token-ids has '\[CLS\]', which is no token of "):
        invoke("evaluate", tmp_path / "dense", "--pattern", "marked()", "--text", text, "--global-token-ids", "[CLS]")
    (tmp_path / "dense" / "tokenizer.json").unlink()
    (tmp_path / "dense" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="--global-token-ids has texts, and .* has no tokenizer that knows them"):
        invoke(*given, "[CLS]", "--overwrite")


@pytest.mark.parametrize(
    ("head", "auto"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("BertModel", "AutoModel"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("T5EncoderModel", "AutoModelForTextEncoding"),
    ],
)
def test_the_class_that_loads_a_folder_is_named(head, auto, tmp_path):
    from sparse_hf.conversion.loading import auto_class

    model = dense_model(head)
    model.save_pretrained(tmp_path / "dense")
    sparse_hf.sparsify(model, "window(9, 9)").save_pretrained(tmp_path / "sparse")
    assert auto_class(tmp_path / "dense") == auto_class(tmp_path / "sparse") == auto


def test_writing_says_so_as_json(sparse_llama, tmp_path):
    found = json.loads(invoke("export", sparse_llama, tmp_path / "dense", "--to", "dense", "--json"))
    assert found == {"folder": str(tmp_path / "dense"), "auto_class": "AutoModelForCausalLM"}
    found = json.loads(invoke("convert", tmp_path / "dense", tmp_path / "out", "--pattern", "first(1)", "--json"))
    assert found == {"folder": str(tmp_path / "out"), "auto_class": "AutoModelForCausalLM"}
    arguments = ("--pattern", "first(1)", "--dry-run", "--json")
    assert json.loads(invoke("convert", tmp_path / "dense", tmp_path / "no", *arguments))["family"] == "llama"


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"^--device is 'cuda', and torch [^\n]* finds 0 CUDA devices; use 'cpu'$"):
        invoke("bench", "attention", "--device", "cuda")
