"""The training examples run with `--tiny`, and go on after they were killed."""

from __future__ import annotations

import json
import logging
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.fresh import fresh
from tests.processes import TORCHRUN, finished

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
COMMON = ["--tiny", "--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def run(name: str, out: Path, *options: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([*COMMON, "--output_dir", str(out), *options])


def losses(out: Path) -> dict[int, float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.parametrize("name", ["run_clm", "run_mlm"])
def test_language_models_learn(name, tmp_path):
    metrics = run(name, tmp_path, "--max_steps", "20", "--learning_rate", "3e-3", "--save_strategy", "no")
    found = losses(tmp_path)
    assert len(found) == 20 and found[20] < found[1] - 0.5
    assert metrics["perplexity"] < 300
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("sparse_")


def test_classification_learns_with_marked_headers(tmp_path):
    options = ["--max_steps", "40", "--learning_rate", "4e-3", "--headers", r"^Article \d+$", "--save_strategy", "no"]
    metrics = run("run_classification", tmp_path, *options)
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_f1"] == 1.0


def test_a_file_of_texts_is_read_and_streamed(tmp_path):
    from examples import tiny

    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps(example) for example in tiny.texts(30)))
    run("run_clm", tmp_path / "first", "--max_steps", "1", "--save_strategy", "no")
    options = ["--tiny", "False", "--model_name_or_path", str(tmp_path / "first"), "--max_length", "128"]
    options += ["--train_file", str(file), "--validation_file", str(file), "--streaming", "--save_strategy", "no"]
    metrics = run("run_clm", tmp_path / "second", *options, "--max_steps", "2")
    assert metrics["perplexity"] > 1 and not (tmp_path / "second" / "converted").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("run_clm", ["--tiny", "False"], "model_name_or_path is missing"),
        ("run_clm", ["--streaming"], "say --max_steps"),
        ("run_clm", ["--dataset_name", "a", "--train_file", "b"], "give one"),
        ("run_clm", ["--resume_from_checkpoint", "nowhere"], "is no folder"),
        ("run_clm", ["--text_column", "body"], "--text_column is 'body'; the data set has text, label"),
        ("run_clm", ["--tiny", "False", "--model_name_or_path", "/no/model"], "/no/model is no folder"),
        ("run_classification", ["--label_column", "class"], "--label_column is 'class'; the data set has text, label"),
        ("run_classification", ["--pattern", "window(4, 4)", "--headers", "^A"], r"speaks of none; add marked\(\)"),
        ("run_summarization", ["--streaming", "--max_steps", "1"], "leave it out"),
        ("run_summarization", ["--max_target_length", "999"], "is 999; the decoder has 128 positions"),
        ("run_mlm_no_trainer", ["--streaming"], "use the example with Trainer"),
        ("run_mlm_no_trainer", ["--per_device_train_batch_size", "99"], "make 0 batches"),
    ],
)
def test_mistakes_are_told(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(name, tmp_path, *options)


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
import importlib

name, *arguments = sys.argv[1:]
example = importlib.import_module("examples." + name)
trainer_name = "Trainer" if name == "run_clm" else "Seq2SeqTrainer"
Trainer = getattr(example, trainer_name)

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

def trainer(*args, **kwargs):
    return Trainer(*args, **kwargs, callbacks=[Kill()])

trainer.evaluate = Trainer.evaluate

setattr(example, trainer_name, trainer)
example.main(arguments)
"""


@pytest.mark.parametrize("name", ["run_clm", pytest.param("run_summarization", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_it_had_not_been(name, tmp_path):
    options = [
        "--max_steps",
        "8",
        "--save_steps",
        "3",
        "--save_total_limit",
        "9",
        "--learning_rate",
        "3e-3",
        "--per_device_train_batch_size",
        "2",
    ]
    # a model that has not learned to end goes on to the last token
    options += ["--max_target_length", "20"] if name == "run_summarization" else []
    run(name, tmp_path / "whole", *options)
    killed = tmp_path / "killed"
    status, said = fresh(KILLED, name, *COMMON, "--output_dir", str(killed), *options)
    assert status == -signal.SIGKILL, said[-2000:]
    assert (killed / "checkpoint-3").is_dir() and not (killed / "trainer_state.json").exists()
    before = time.time()
    run(name, killed, *options, "--resume_from_checkpoint", "True")
    # what came before was not done again
    assert (killed / "checkpoint-3" / "model.safetensors").stat().st_mtime < before
    assert losses(killed) == losses(tmp_path / "whole")
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("options", [["--distil", "--edges", "32"], ["--lora_rank", "4"]], ids=["distil", "lora"])
def test_healing_heals(options, tmp_path):
    metrics = run("heal", tmp_path, *options, "--max_steps", "20", "--learning_rate", "3e-3", "--save_strategy", "no")
    assert metrics["after_perplexity"] < metrics["before_perplexity"] - 20
    assert ("after_perplexity_0-31" in metrics) == ("--edges" in options)
    run("run_clm", tmp_path / "next", "--tiny", "False", "--model_name_or_path", str(tmp_path), "--do_eval", "--max_length", "64",
        "--train_file", _file(tmp_path))  # fmt: skip


def _file(folder: Path, kind: str = "texts") -> str:
    from examples import tiny

    file = folder / f"{kind}.jsonl"
    file.write_text("\n".join(json.dumps(example) for example in getattr(tiny, kind)(30)))
    return str(file)


@pytest.mark.parametrize("name", ["run_clm_no_trainer", "run_mlm_no_trainer"])
def test_the_plain_loop_learns_and_goes_on(name, tmp_path):
    options = ["--max_steps", "8", "--save_steps", "3", "--learning_rate", "3e-3", "--per_device_train_batch_size", "2"]
    options += ["--gradient_accumulation_steps", "2"]
    perplexity = run(name, tmp_path / "whole", *options)
    found = json.loads((tmp_path / "whole" / "losses.json").read_text())
    assert len(found) == 8 and found["8"] < found["1"] - 0.1
    again = tmp_path / "whole" / "checkpoint-3"
    resumed = run(name, tmp_path / "on", *options, "--resume_from_checkpoint", str(again))
    losses = json.loads((tmp_path / "on" / "losses.json").read_text())
    assert len(losses) == 8 and [losses[step] for step in "123"] == [found[step] for step in "123"]
    assert losses == found and resumed == perplexity


@pytest.mark.parametrize("file", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda f: f.stem)
def test_configurations_are_accelerate_s(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert (
        config.distributed_type.value
        == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED", "cpu": "NO"}[file.stem]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run_clm", "run_clm_no_trainer", "run_mlm_no_trainer", "heal"])
def test_two_processes_learn_what_one_does(name, tmp_path):
    """Two processes with half the rows each: the same losses."""
    found = []
    for processes, rows in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        launch = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else []
        options = ["--max_steps", "4", "--per_device_train_batch_size", str(rows), "--output_dir", str(out)]
        options += ["--save_strategy", "no"]
        options += {"heal": ["--distil"], "run_clm": []}.get(name, ["--save_steps", "100"])
        status, said = finished(*launch, str(EXAMPLES / f"{name}.py"), *COMMON, *options)
        file = out / {"heal": "healing.json", "run_clm": "trainer_state.json"}.get(name, "losses.json")
        assert status == 0 and file.exists(), said[-3000:]
        found.append(losses(out) if name == "run_clm" else json.loads(file.read_text()))
    # masks are drawn batch by batch, and batches are others
    assert found[1] == pytest.approx(found[0], rel=0.05 if name == "run_mlm_no_trainer" else 1e-4)


def test_questions_are_answered(tmp_path):
    metrics = run("run_qa", tmp_path, "--max_steps", "30", "--learning_rate", "3e-3", "--save_strategy", "no")
    found = losses(tmp_path)
    assert found[30] < found[1] - 0.3 and metrics["eval_f1"] >= metrics["eval_exact_match"]


def test_the_likeliest_span_ends_behind_its_start():
    import numpy as np

    spans = runpy.run_path(str(EXAMPLES / "run_qa.py"))["spans"]
    starts, ends = np.zeros((1, 100)), np.zeros((1, 100))
    starts[0, [40, 90]], ends[0, [10, 45]] = [5, 4], [9, 5]
    # the best end comes before the best start
    assert spans(starts, ends) == [(40, 45)]


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_models_are_taken_as_they_were_asked_for(tmp_path):
    """A dense model gets pattern and positions as asked; a sparse one keeps its own."""
    quick = ["--max_steps", "1", "--save_strategy", "no"]
    run("run_mlm", tmp_path / "out", *quick)
    dense = ["--tiny", "False", "--model_name_or_path", str(tmp_path / "out" / "tiny"), "--train_file", _file(tmp_path)]
    again = [*dense, "--pattern", "window(4, 4)"]
    for length in (128, 160):
        run("run_mlm", tmp_path / "out", *quick, *again, "--max_length", str(length))
        found = _config(tmp_path / "out")
        assert found["max_position_embeddings"] == length
        assert found["sparse_attention"]["patterns"] == {"sparse": "window(4, 4)"}
    sparse = [*dense[:3], str(tmp_path / "out"), *dense[4:]]
    with pytest.raises(ValueError, match="have 161 tokens and .* has 160 positions"):
        run("run_mlm", tmp_path / "next", *sparse, "--max_length", "161")
    with pytest.raises(ValueError, match="is sparse already"):
        run("run_mlm", tmp_path / "next", *sparse, "--pattern", "window(4, 4)")
    with pytest.raises(ValueError, match="is a bert, which AutoModelForSeq2SeqLM has no model of"):
        run("run_summarization", tmp_path / "next", *dense[:4], "--train_file", _file(tmp_path, "summaries"))
    with pytest.raises(ValueError, match="is an encoder, whose tokens see those that they would have to foretell"):
        run("run_clm", tmp_path / "next", *dense[:4], "--pattern", "window(4, 4)", "--train_file", _file(tmp_path))
    # a model half trained is no other model
    (tmp_path / "out" / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="give another --output_dir"):
        run("run_mlm", tmp_path / "out", *quick, *dense, "--pattern", "window(5, 5)", "--max_length", "160")


def test_arguments_are_read_from_a_file(tmp_path):
    from examples.training import ModelArguments, parse

    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"tiny": True, "max_length": 77}))
    model, data, training = parse([str(file)], "", model=ModelArguments)
    assert (model.max_length, data.text_column, training.output_dir, training.logging_steps) == (77, "text", "out", 10)
    file.write_text(json.dumps({"tiny": True, "streaming": True}))
    with pytest.raises(ValueError, match="say --max_steps"):
        parse([str(file)], "")


@pytest.mark.parametrize("name", sorted(file.stem for file in EXAMPLES.glob("run_*.py")) + ["heal"])
def test_help_begins_with_what_an_example_does(name, capsys):
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    with pytest.raises(SystemExit):
        example["main"](["--help"])
    about, options = capsys.readouterr().out.split("options:")
    assert example["__doc__"].strip() in about and "--output_dir" in options


LEARNING = [
    "--max_steps",
    "60",
    "--learning_rate",
    "1e-2",
    "--per_device_eval_batch_size",
    "20",
    "--save_strategy",
    "no",
]


def test_summaries_are_those_of_transformers_led(tmp_path):
    """Learned, and scored as Transformers' LED with these weights and `<s>` global."""
    import torch
    from rouge_score.rouge_scorer import RougeScorer
    from transformers import AutoTokenizer, LEDConfig, LEDForConditionalGeneration
    from transformers.models.led.modeling_led import shift_tokens_right

    from examples import tiny
    from sparse_hf.conversion.export import export

    metrics = run("run_summarization", tmp_path / "out", *LEARNING)
    found = losses(tmp_path / "out")
    assert len(found) == 60 and found[60] < found[1] - 2
    export(tmp_path / "out", tmp_path / "dense", to="dense")
    model = LEDForConditionalGeneration.from_pretrained(tmp_path / "dense").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert type(model.config) is LEDConfig
    rows = tiny.summaries(20, seed=1)
    batch = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=128, return_tensors="pt")
    marks = torch.zeros_like(batch.input_ids)
    marks[:, 0] = 1
    labels = tokenizer([row["summary"] for row in rows], padding=True, return_tensors="pt").input_ids
    decoder = shift_tokens_right(labels, 0, 3)
    labels[labels == 0] = -100
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "global_attention_mask": marks}
    with torch.no_grad():
        loss = model(**inputs, labels=labels, decoder_input_ids=decoder).loss
        unmarked = model(
            **{**inputs, "global_attention_mask": 0 * marks}, labels=labels, decoder_input_ids=decoder
        ).loss
    assert metrics["eval_loss"] == pytest.approx(float(loss), abs=1e-5)
    assert abs(float(loss - unmarked)) > 1e-4
    made = tokenizer.batch_decode(model.generate(**inputs, max_length=129, num_beams=1), skip_special_tokens=True)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(row["summary"], text) for row, text in zip(rows, made, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert metrics[f"eval_{name}"] == pytest.approx(sum(100 * s[name].fmeasure for s in scores) / 20)
    # more than one summary of all texts can have
    assert metrics["eval_rouge1"] > 75


def test_rows_that_processes_repeat_are_not_scored():
    from types import SimpleNamespace

    from examples import run_summarization, tiny

    tokenizer = tiny.tokenizer()
    ids = tokenizer(["the old ship", "a whale", "wind and salt"], padding=True, return_tensors="np")["input_ids"]
    right = SimpleNamespace(predictions=ids, label_ids=ids)
    wrong = SimpleNamespace(predictions=ids, label_ids=ids[[0, 1, 0]])
    scored = [run_summarization.rouge(tokenizer, count)(row) for count, row in ((3, right), (3, wrong), (2, wrong))]
    assert [found["rouge1"] for found in scored] == [100, pytest.approx(200 / 3), 100]
    assert scored[0]["rougeL"] == 100 and scored[0]["gen_len"] == pytest.approx((ids > 4).sum() / 3)


def test_summaries_without_rouge_say_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", logger="transformers.examples"):
        metrics = run("run_summarization", tmp_path, "--max_steps", "1", "--save_strategy", "no")
    assert "rouge_score is not installed" in caplog.text and "pip install rouge-score" in caplog.text
    assert metrics["eval_loss"] > 0 and not any("rouge" in name for name in metrics)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_summaries_by_other_families(family, tmp_path):
    """A dense model of 64 positions reads 96 tokens, its headers marked.

    T5 has no class token.
    """
    from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config

    from examples import tiny

    tokenizer = tiny.tokenizer(causal=family == "t5")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    sides = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 2))
    }
    config = {
        "bart": lambda: BartConfig(d_model=32, max_position_embeddings=64, forced_eos_token_id=3, **sides, **ids),
        "t5": lambda: T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, **ids),
    }[family]()
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = [
        "--tiny",
        "False",
        "--model_name_or_path",
        str(tmp_path / "dense"),
        "--train_file",
        _file(tmp_path, "summaries"),
    ]
    options += ["--pattern", "window(8, 8) | marked()", "--layers", "decoder=dense", "--headers", r"^Article \d+$"]
    options += [
        "--max_source_length",
        "96",
        "--max_target_length",
        "20",
        "--num_beams",
        "2",
        "--source_prefix",
        "say: ",
    ]
    metrics = run("run_summarization", tmp_path / "out", *options, "--max_steps", "2", "--save_strategy", "no")
    assert metrics["eval_gen_len"] <= 21 and metrics["eval_rouge1"] >= 0
    found = _config(tmp_path / "out")
    assert found["model_type"] == f"sparse_{family}" and found.get("max_position_embeddings", 96) == 96


def test_texts_and_summaries_are_columns_of_a_row():
    """First token and headers are marked, the rest is cut, and the prefix comes first."""
    from types import SimpleNamespace

    import torch
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq

    from examples import run_summarization as example
    from examples import tiny
    from sparse_hf.train import MarkHeaders

    tokenizer = tiny.tokenizer()
    rows = Dataset.from_list(
        [{"text": "Article 1\na whale", "summary": "the sea"}, {"text": "salt " * 50, "summary": "a"}]
    )
    pad = DataCollatorForSeq2Seq(tokenizer)
    asked = SimpleNamespace(source_prefix="say\n", summary_column="summary", max_target_length=3)
    columns = SimpleNamespace(text_column="text")
    made = example.encoded(rows, tokenizer, columns, asked, 24, MarkHeaders(pad, r"^Article \d+$"))
    batch = example.MarkFirst(pad)(list(made))
    assert batch["input_ids"].shape[1] == 24 and batch["labels"].shape == (2, 3)
    assert batch["labels"][1].tolist().count(-100) == 3 - len(made[1]["labels"])
    marked = batch["global_attention_mask"].bool()
    assert tokenizer.decode(batch["input_ids"][0][marked[0]]) == "[CLS]Article 1"
    assert marked[1].nonzero().tolist() == [[0]] and torch.equal(marked, marked & batch["attention_mask"].bool())
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True).startswith("say\nArticle 1\na whale")


def test_papers_are_read_with_their_headers(tmp_path, monkeypatch):
    from examples import papers

    said = {"outcome": "It works.", "challenge": "It is hard.", "approach": "They try."}
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": "X1", "summary": said, "title": "not read"}) + "\n")
    paragraphs = [
        ("1", "Introduction", "One."),
        ("1", "Introduction", "Two."),
        (None, "Method", "Three."),
        (None, "", "http://x"),
    ]
    body = [{"sec_num": number, "section": header, "text": text} for number, header, text in paragraphs]
    paper = {"title": "A title", "abstract": "In short.", "pdf_parse": {"body_text": body}}
    (tmp_path / "X1.json").write_text(json.dumps(paper))
    monkeypatch.setattr(papers, "fetch", lambda asset: tmp_path)
    (row,) = papers.papers("train")
    assert row["text"].split("\n") == [
        "A title",
        "Abstract",
        "In short.",
        "1 Introduction",
        "One.",
        "Two.",
        "Method",
        "Three.",
    ]
    assert row["id"] == "X1" and row["summary"] == "It is hard. They try. It works."


def write_paper(folder: Path, name: str, split: str, chosen: int) -> None:
    """A paper of three sections with two sentences each, one of them the outcome."""
    parts = {part: [f"We saw {part} salt .", f"They say that {part} rows ( {name} ) ."] for part in PAPER_PARTS}
    flags = {part: [int(i == chosen) for i in range(2)] for part in parts}
    none = {part: [0, 0] for part in parts}
    marked = {"challenge": none, "approach": none, "outcome": flags}
    said = dict.fromkeys(marked, "Nothing.")
    with (folder / f"{split}.jsonl").open("a") as file:
        file.write(json.dumps({"id": name, "summary": said, "sentences": parts, "highlights": marked}) + "\n")
    # a text has no spaces before stops, and sentences may run over lines
    body = [(part.title(), " ".join(parts[part]).replace(" .", ".").replace("( ", "(\n")) for part in PAPER_PARTS[1:]]
    middle = ("Method", "the old ship sailed over waves " * 20)
    paragraphs = [{"sec_num": None, "section": h, "text": t} for h, t in (body[0], middle, body[1])]
    abstract = " ".join(parts["abstract"])
    paper = {"title": name, "abstract": abstract, "pdf_parse": {"body_text": paragraphs}}
    (folder / f"{name}.json").write_text(json.dumps(paper))


PAPER_PARTS = ("abstract", "introduction", "conclusion")


def test_questions_are_answered_by_sentences_that_experts_marked(tmp_path, monkeypatch):
    from examples import papers

    monkeypatch.setattr(papers, "fetch", lambda asset: tmp_path)
    write_paper(tmp_path, "X1", "train", 1)
    write_paper(tmp_path, "X2", "train", 0)
    rows = list(papers.questions("train"))
    assert [row["question"] for row in rows] == [f"Which outcome does the {part} name?" for part in PAPER_PARTS] * 2
    answers = [row["answers"]["text"] for row in rows]
    assert answers[:2] == [["They say that abstract rows ( X1 ) ."], ["They say that introduction rows (\nX1 )."]]
    assert answers[5] == ["We saw conclusion salt."]
    for row in rows:
        (start,), (answer,) = row["answers"]["answer_start"], row["answers"]["text"]
        assert row["context"][start:].startswith(answer)
    assert papers.place("a b.", "a  b. A b .") == (0, 5)
    assert papers.place("a b.", "a b. Then a b.") is None and papers.place("a c", "a b") is None


def test_papers_are_asked_without_files(tmp_path, monkeypatch):
    from examples import papers

    run("run_mlm", tmp_path / "first", "--max_steps", "1", "--save_strategy", "no")
    monkeypatch.setattr(papers, "fetch", lambda asset: tmp_path)
    for split in ("train", "val"):
        for i in range(3):
            write_paper(tmp_path, f"{split}{i}", split, i % 2)
    options = ["--tiny", "False", "--model_name_or_path", str(tmp_path / "first" / "tiny"), "--max_length", "512"]
    options += ["--pattern", "window(8, 8) | marked()", "--max_steps", "20", "--learning_rate", "1e-2"]
    metrics = run("run_qa", tmp_path / "out", *options, "--save_strategy", "no")
    found = losses(tmp_path / "out")
    assert found[20] < found[1] - 1 and 0 <= metrics["eval_exact_match"] <= metrics["eval_f1"] <= 1


@pytest.mark.slow
def test_papers_are_those_of_the_package():
    from examples.papers import papers, questions

    sizes = {"train": 100, "val": 50, "test": 100}
    rows = {split: papers(split) for split in sizes}
    assert {split: len(found) for split, found in rows.items()} == sizes
    assert len({name for found in rows.values() for name in found["id"]}) == 250
    words = sorted(len(text.split()) for found in rows.values() for text in found["text"])
    assert words[0] > 1500 and 4400 < words[125] < 4600
    asked = questions("train")
    assert len(asked) > 600 and len(set(asked["context"])) == 100
    for row in asked:
        for answer, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(answer)] == answer and len(answer.split()) > 2
    # conclusions stand at the end of what is read whole
    places = sorted(
        row["answers"]["answer_start"][0] / len(row["context"]) for row in asked if "conclusion" in row["question"]
    )
    assert places[len(places) // 2] > 0.8
