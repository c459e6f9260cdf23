"""What a user can get wrong: one readable sentence that names field and value, exit code 2, and nothing left behind."""

import argparse
import functools
import gzip
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from moe_lm import cli, config
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice
from moe_lm.config import _parse_value, load, save
from moe_lm.data.prepare import prepare
from moe_lm.data.prepared import open_set
from moe_lm.errors import InputError
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.plain import to_plain
from moe_lm.training.progress import Progress
from tests.models import write_tokenizer

TEXT = [
    "data=text",
    "data.paths=book.txt",
    "tokenizer.vocab_size=500",
    "trainer.max_steps=2",
    "schedule.warmup_steps=1",
]
"""A run that would be valid and short, so that nothing but the mistake under test can stop it."""


@pytest.fixture(autouse=True, scope="module")
def _compose_once():
    """Hydra takes 70 ms to read the same groups again for every case; what it gives is only ever copied."""
    original = config._compose
    cached = functools.cache(lambda command, groups: original(command, list(groups)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_compose", lambda command, groups: cached(command, tuple(groups)))
        yield


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with good and bad files in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "book.txt").write_text(Path(argparse.__file__).read_text(encoding="utf-8"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "tiny.txt").write_text("hi\n")
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "nothing").mkdir()
    good = '{"text": "a good row"}\n'
    (tmp_path / "rows.jsonl").write_text(good * 300)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(9000).hex().encode() + good.encode())[:-9])
    (tmp_path / "tail.jsonl").write_text(good + good[:-4])
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n' * 30)
    for name, text in (("null", "null"), ("nul", '"a\\u0000"'), ("surrogate", '"a\\ud800"')):
        (tmp_path / f"{name}.jsonl").write_text(good + '{"text": ' + text + "}\n")
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    return tmp_path


@pytest.fixture
def complain(place, capsys):
    """Runs a command that must be refused; returns its sentence."""

    def run(*arguments: str) -> str:
        before = _content(place)
        assert cli.main(list(arguments)) == 2
        message = capsys.readouterr().err.replace("moe-lm (rank 3): ", "moe-lm: ")
        assert message.startswith("moe-lm: ") and message.endswith("\n") and message.count("\n") == 1, message
        assert "Traceback" not in message and "object at 0x" not in message and len(message) < 1000, message
        assert _content(place) == before, "something was left behind"
        return message.removeprefix("moe-lm: ").removesuffix("\n")

    return run


def _content(place: Path) -> set[Path]:
    """Everything under a directory, but for an empty `runs`."""
    return {p for p in place.rglob("*") if p != place / "runs"}


# Names


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("trainer.max_step", "trainer.max_steps"),
        ("model.num_expert", "model.num_experts"),
        ("max_steps", "trainer.max_steps"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("dat.paths", "data.paths"),
        ("modle", "model"),
        ("experimnt", "experiment"),
        ("model@other", "model"),
        ("Trainer.Max_Steps", "trainer.max_steps"),
        ("steps", "trainer.max_steps"),
        ("ep", "parallel.ep"),
    ],
)
def test_misspelt_options_get_the_nearest_name(complain, prefix, given, nearest):
    """Catches an option that is silently ignored, or added as a new one (Hydra accepts `+typo=3`)."""
    said = complain("pretrain", *TEXT, f"{prefix}{given}=10")
    assert said == f"{prefix}{given}=10: there is no option {given!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("command", "given", "nearest"),
    [
        ("export", "checkpont", "checkpoint"),
        ("export", "out", "output"),
        ("generate", "promt", "prompt"),
        ("generate", "max_tokens", "max_new_tokens"),
        ("generate", "topk", "top_k"),
    ],
)
def test_misspelt_options_of_other_commands_too(complain, command, given, nearest):
    """Catches a suggestion that only pretrain has."""
    assert f"did you mean {nearest!r}?" in complain(command, f"{given}=10")


@pytest.mark.parametrize(
    "given", ["zzzz", "hydra.run.dir", "_target_", "model._target_", "é", "a b", "", "tokenizer.a.b"]
)
def test_options_of_nobody_point_to_help(complain, given):
    """Catches a door into Hydra's own settings, or a name that the parser chokes on."""
    said = complain("pretrain", *TEXT, f"{given}=1")
    assert said.startswith(f"{given}=1: there is no option {given!r}; ")


@pytest.mark.parametrize(
    "given", ["model.densee", "model=densee", "model=Dense", "model=", "model=null", "model=[dense]"]
)
def test_group_choices_are_named(complain, given):
    """Catches Hydra's page-long complaint about a configuration that can not be found."""
    said = complain("pretrain", *TEXT, given)
    if "=" in given:
        assert said == f"{given}: there is no such model; choose from dense, mixtral_8x7b, mixture."
    else:
        assert said.startswith("'model.densee': options are written NAME=VALUE")


@pytest.mark.parametrize(
    "given", ["experiment=stdlb", "+experiment=nope", "tracker=tensorboard", "trainer={max_steps:3}"]
)
def test_choices_of_every_group_are_named(complain, given):
    """Catches a group that is checked by Hydra instead of by us."""
    said = complain("pretrain", *TEXT, given)
    assert said.startswith(f"{given}: there is no such ") and "choose from " in said


@pytest.mark.parametrize("given", ["~trainer.max_steps", "~trainer.max_steps=2", "~model", "~model=mixture"])
def test_deleting_is_refused(complain, given):
    """Catches a field that is deleted and then missing."""
    assert complain("pretrain", *TEXT, given) == f"{given}: only NAME=VALUE sets a value."


@pytest.mark.parametrize(
    "given", ["trainer.max_steps", "--trainer.max_steps=3", "--max-steps", "-x", "book.txt", "", "+", "---", "model"]
)
def test_arguments_that_are_no_options_are_quoted(complain, given):
    """Catches flags in another tool's manner ending in a parser's traceback."""
    said = complain("pretrain", *TEXT, given)
    assert said == f"{given!r}: options are written NAME=VALUE; `moe-lm pretrain --help` lists them."


# Values


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *(
            (f"trainer.max_steps={value}", "a whole number")
            for value in ("abc", "1.5", "1e3", "null", "", "[1,2]", "{a:1}", "true", "'3 steps'", "nan", "${model}")
        ),
        *((f"optimizer.learning_rate={value}", "a number") for value in ("fast", "null", "[1]", "", "1..2", "{}")),
        *((f"finish.export={value}", "true or false") for value in ("maybe", "null", "2.5", "[true]")),
        *((f"data.paths={value}", "a list of texts") for value in ("null", "{a:b}", "[null]")),
        ("model.sliding_window=none", "a whole number or null"),
        ("model.head_dim=[]", "a whole number or null"),
        ("trainer.device=gpu", "one of auto, cpu, cuda"),
        ("trainer.precision=fp16", "one of auto, bf16, fp32"),
        ("trainer.precision=null", "one of auto, bf16, fp32"),
        ("optimizer.name=sgd", "one of adamw, muon"),
        ("schedule.name=Cosine", "one of cosine, wsd, constant"),
        ("model.family=moe", "one of mixture, dense"),
        ("model.load_balancing=", "one of per_layer, pooled, none"),
        ("resume.policy=always", "one of auto, never"),
        ("tracker.mode=[online]", "one of online, offline"),
        ("data.source=csv", "one of stdlib, text, jsonl, chat, parquet, arrow, huggingface, prepared"),
        ("seed=${trainer.device}", "a whole number"),
        ("seed=${run_name}", "a whole number"),
    ],
)
def test_values_of_the_wrong_type_say_what_is_wanted(complain, given, expected):
    """Catches a value that is converted to something else, and OmegaConf's own words for it."""
    assert complain("pretrain", *TEXT, given) == f"{given}: must be {expected}."


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("model.num_experts_per_tok=9", "must be at most model.num_experts=8"),
        ("model.num_experts=1", "model.num_experts_per_tok=2: must be at most model.num_experts=1"),
        ("model.num_attention_heads=3", "must be a multiple of model.num_key_value_heads=2"),
        ("model.num_key_value_heads=3", "must be a multiple of model.num_key_value_heads=3"),
        ("model.hidden_size=250", "must be a multiple of model.num_attention_heads=4"),
        ("model.hidden_size=268", "by model.num_attention_heads=4 must be even"),
        ("model.hidden_size=-256", "must be at least 1"),
        ("model.head_dim=7", "must be even"),
        ("model.sliding_window=0", "must be at least 1"),
        ("model.router_aux_loss_coef=-0.1", "must not be negative"),
        ("model.rope_theta=0", "must be greater than 0"),
        ("model.vocab_size=499", "must be at least tokenizer.vocab_size=500"),
        ("trainer.max_steps=-5", "must be at least 1"),
        ("trainer.max_steps=0", "must be at least 1"),
        ("trainer.global_batch_size=10", "must be a multiple of trainer.micro_batch_size=16"),
        ("trainer.micro_batch_size=0", "must be at least 1"),
        ("trainer.log_interval=0", "must be at least 1"),
        ("trainer.eval_interval=-1", "must not be negative"),
        ("optimizer.learning_rate=0", "must be greater than 0"),
        ("optimizer.beta2=1", "must lie in [0, 1)"),
        ("schedule.warmup_steps=-1", "must not be negative"),
        ("schedule.final_factor=2", "must lie in [0, 1]"),
        ("checkpoint.interval=-1", "must be 0"),
        ("trainer.step_timeout=-1", "from 0 to 604800"),
        ("trainer.stop_deadline=0", "from 1 to 604800"),
        ("data.domain=", "give a name, or null"),
        ("checkpoint.keep_last=0", "must be at least 1"),
        ("checkpoint.keep_every=-1", "must be 0 (none) or a number of steps"),
        ("parallel.placement=file", "parallel.placement_file=null: parallel.placement=file needs the file"),
        ("parallel.placement_file=p.json", "is not read with parallel.placement=contiguous; set parallel.pl"),
        ("resume.allow_change=[trainer.max_step]", "there is no option 'trainer.max_step'; did you mean 'trainer.m"),
        ("finish.sample_tokens=0", "must be at least 1"),
        ("seed=-1", "must not be negative"),
        ("data.sequence_length=1", "must be at least 2"),
        ("data.sequence_length=4097", "must be at most model.max_position_embeddings=4096"),
        ("data.validation_fraction=0", "must be above 0"),
        ("data.validation_fraction=0.6", "at most 0.5"),
        ("data.text_field=", "must name the field"),
        ("tokenizer.vocab_size=383", "must be between 384"),
        ("tokenizer.training_bytes=1", "must be at least 100000"),
        ("tokenizer.path=", "give a sentencepiece .model file"),
        ("output_dir=", "give a directory"),
        ("data.paths=[]", "needs at least one file"),
        ("data.paths=", "none of them empty"),
        ('data.paths=["",book.txt]', "none of them empty"),
        ("data.paths=[[book.txt]]", "must be a list of texts"),
        ("data.paths=[{a:b}]", "must be a list of texts"),
        ("data=stdlib", "data.source=stdlib reads no paths"),
        ("run_name=", "letters, digits"),
        (f"run_name={'a' * 201}", "use at most 200 letters"),
        ("run_name=../up", "directories belong into output_dir"),
        ("run_name=a/b", "directories belong into output_dir"),
        ("run_name=.hidden", "beginning with a letter or digit"),
        ('run_name="日本"', "letters, digits"),
        ('run_name="a\nb"', "letters, digits"),
    ],
)
def test_values_out_of_range_are_named(complain, given, words):
    """Catches a value that fails only when training begins, or not at all."""
    said = complain("pretrain", *TEXT, given)
    assert words in said and re.match(r"[a-z0-9_.]+='?.*'?: ", said), "a field with its value comes first"


def test_a_model_that_memory_can_not_hold_is_named(complain):
    """Catches a run that is killed while it makes its weights."""
    said = complain("pretrain", *TEXT, f"model.num_hidden_layers={10**7}")
    named = re.match(r"model: ([\d.]+) B parameters need ([\d,]+) GiB for weights, gradients, moments", said)
    assert named and int(named[2].replace(",", "")) > 8 * float(named[1])
    assert "choose a smaller model, or share it among more processes (parallel=fsdp_ep)" in said


def test_rows_that_memory_can_not_hold_are_named(complain):
    """Catches a run that is killed in its first step, when all of its text is prepared."""
    rows = 10**9
    said = complain("pretrain", *TEXT, f"trainer.micro_batch_size={rows}", f"trainer.global_batch_size={rows}")
    assert said.startswith(f"trainer.micro_batch_size={rows}: so many rows of ") and "GiB for each process" in said


def test_rows_too_long_for_their_mask_are_named(complain):
    """Catches a table of who sees whom, the square of a row's length, that nobody has reckoned with."""
    length = 2_000_000
    long = [f"model.max_position_embeddings={length}", f"data.sequence_length={length}"]
    said = complain("pretrain", *TEXT, *long, "trainer.micro_batch_size=1", "trainer.global_batch_size=1")
    named = re.match(rf"trainer.micro_batch_size=1: so many rows of {length} tokens need ([\d,]+) GiB", said)
    assert named and int(named[1].replace(",", "")) > length**2 / 2**30 and "a smaller data.sequence_length" in said


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("pretrain", name) for name in ("output_dir", "data.paths", "data.validation_paths", "data.sources.a.paths")),
        *(("pretrain", name) for name in ("data.chat_template", "tokenizer.path", "parallel.placement_file")),
        *(("finetune", "base"), ("prepare", "output"), ("plan placement", "trace"), ("plan placement", "output")),
        *(("generate", "checkpoint"), ("generate", "prompts"), ("verify", "against"), ("export", "base")),
    ],
)
def test_paths_that_can_not_be_are_named(complain, place, command, option):
    """Catches a traceback of `pathlib` for a home directory of nobody, a name too long, or a link to itself."""
    (place / "loop").symlink_to("loop")
    for path, words in (
        ("~nouser/x", "~nouser is no home directory here; write ./~nouser/x if it is a name."),
        ("a" * 300, "can not be a path (File name too long); give another."),
        ("loop/x", "can not be a path (Too many levels of symbolic links); give another."),
    ):
        given = f'{option}=[book.txt,"{path}"]' if option.endswith("paths") else f"{option}={path}"
        assert complain(*command.split(), given) == f"{given}: {words}"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "field", ["optimizer.learning_rate", "optimizer.max_grad_norm", "model.rope_theta", "model.router_z_loss_coef"]
)
def test_numbers_must_be_finite(complain, field, value):
    """Catches infinity, which passes every "greater than 0" and ruins the weights in one step."""
    assert complain("pretrain", *TEXT, f"{field}={value}") == f"{field}={value}: must be a finite number."


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("seed=${trainer.max_step}", "Interpolation key 'trainer.max_step' not found"),
        ("trainer.max_steps=???", "Missing mandatory value"),
        ("data.paths=[${nope}]", "Interpolation key 'nope' not found"),
    ],
)
def test_interpolations_to_nowhere_are_named(complain, given, words):
    """Catches a reference that is only followed, and only fails, where the value is used."""
    field, _, value = given.partition("=")
    said = complain("pretrain", *TEXT, given)
    assert said.startswith(f"{field}=") and value.strip("[]") in said and words in said
    if value != "???":  # help shows a value that is still to be given
        assert field in complain("pretrain", "--help", given)


@pytest.mark.parametrize("value", ["1,2", "range(1,3)", "choice(1,2)", "interval(1,3)", "glob(*)"])
def test_sweeps_are_refused(complain, value):
    """Catches a sweep that trains its first value only, or all in one process."""
    said = complain("pretrain", *TEXT, f"trainer.max_steps={value}")
    assert said == f"trainer.max_steps={value}: a command runs one configuration; start one process for each value."
    assert "one configuration" in complain("pretrain", *TEXT, "model=dense,mixture")


@pytest.mark.parametrize(
    "value",
    [
        "def f(x):",
        "é",
        "a=b",
        '"',
        "[a",
        "a, b",
        "a\nb",
        'say "hi"',
        "{x: 1}",
        "007",
        "true",
        "null",
        "glob(*)",
        "",
        '"x"',
        "${HOME}",
        "\\\\${x}",
        "???",
    ],
)
def test_text_is_taken_as_it_stands(value):
    """Catches a prompt that a grammar reads as a list, a number, a sweep, a quotation or an interpolation."""
    assert load("generate", ["checkpoint=nothing", f"prompt={value}"]).prompt == value
    assert load("generate", [f"checkpoint={value}x"]).checkpoint == f"{value}x"
    with pytest.raises(InputError, match="is required"):
        load("generate", ["checkpoint=null"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b'"\xff"', "no UTF-8 text, see byte 2"),
        (b'"good"\nnot quoted\n', "line 2 is no JSON string"),
        (b'["a"]', "line 1 is no JSON string"),
        (b'"\\ud800"', "line 1 is no JSON string"),
        (b"\xff", "can not be read"),
        (b"[" * 100_000, "line 1 is no JSON string"),
        (b'"good"\n" "\n', "line 2 is an empty message"),
    ],
)
def test_files_of_prompts_are_read_before_the_model(complain, tmp_path, content, words):
    """Catches a traceback, or minutes of work before a bad line is found."""
    (tmp_path / "prompts.jsonl").write_bytes(content)
    chat = f"chat={'message' in words}".lower()
    said = complain("generate", "checkpoint=nothing", f"prompts={tmp_path / 'prompts.jsonl'}", chat)
    assert said.startswith("prompts=") and words in said
    both = complain("generate", "checkpoint=nothing", "prompt=x", f"prompts={tmp_path / 'prompts.jsonl'}")
    assert both.startswith("prompt='x': leave it out")


@pytest.mark.parametrize("value", ["3 +", "(3", "a=b", "[3", "x}"])
def test_values_that_can_not_be_parsed_say_so(complain, value):
    """Catches the grammar's own complaint where a number or a list is wanted."""
    said = complain("pretrain", *TEXT, f"trainer.max_steps={value}")
    assert said.startswith(f"trainer.max_steps={value}: ") and ("can not be parsed" in said or "whole number" in said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("trainer.max_steps=(10)", "must be a whole number."),
        ("trainer.max_steps==3", "must be a whole number."),
        ("finish.export=(true", "must be true or false."),
        ("trainer.device=(cpu)", "must be one of auto, cpu, cuda."),
        ("model=(dense)", "there is no such model; choose from dense, mixtral_8x7b, mixture."),
        ("data.paths=a,b", "give a list, as in data.paths=[a,b]."),
        ("data.paths=[a,]", """can not be parsed; quote its entries, as in 'data.paths=["a"]'."""),
        ("data.paths=it's", """can not be parsed; quote the value, as in 'data.paths="it'"'"'s"'."""),
        ("data.paths=glob(*)", "a command runs one configuration; start one process for each value."),
    ],
)
def test_what_is_advised_is_what_helps(complain, given, said):
    """Catches advice that leads to the next complaint, or that no shell takes."""
    assert complain("pretrain", *TEXT, given) == f"{given}: {said}"


@pytest.mark.parametrize("name", ["ä", "a b", "a[0]", ""])
def test_a_source_is_named_as_it_was_given(complain, name):
    """Catches a remedy for the value where the name of a source is what can not be."""
    said = complain("pretrain", "data=text", f"data.sources.{name}.paths=[book.txt]")
    assert said == f"data.sources.{name}: name a source with letters, digits, '_' and '-'."


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"[a\,b.txt,1e3]", ["a,b.txt", "1e3"]),
        ('["a,1","2"]', ["a,1", "2"]),
        ("[${oc.env:NOBODY,1,b}]", ["${oc.env:NOBODY,1,b}"]),
    ],
)
def test_what_is_escaped_quoted_or_an_interpolation_stays(written, meant):
    """Catches an entry of a list that is cut, or changed, where it looks like several."""
    assert _parse_value(f"data.paths={written}", list[str]) == meant


@pytest.mark.parametrize("entry", ["2024.10", "1e3", "007", "true", "False", "nan", "-5", "a.txt", "a b", "???", "1_0"])
def test_entries_of_a_list_of_texts_are_taken_as_they_stand(entry):
    """Catches the directory 2024.10 that is looked for as 2024.1, and a `true` that is refused as no text."""
    for given, expected in ((f"[{entry}]", [entry]), (entry, [entry]), (f"[ x, {entry} ,\"1, 2\",'3']", None)):
        paths = load("pretrain", ["data=text", f"data.paths={given}"]).data.paths
        assert paths == (expected or ["x", entry, "1, 2", "3"])


def test_of_an_option_given_twice_the_last_counts(complain):
    """Catches a list of options to which a script can not append; also for groups, whatever the prefix."""
    arguments = [*TEXT, "seed=-3", "+seed=4", "model=mixture", "model=dense"]
    loaded = load("pretrain", arguments)
    assert loaded.seed == 4 and not loaded.model.is_mixture
    assert complain("pretrain", *arguments, "++seed=-5") == "seed=-5: must not be negative."


# Data


MIXED = ["data=jsonl", "data.paths=[]"]
"""Sources in place of the one that `TEXT` has."""

WEIGHTS = ["data.sources.a.weight=1", "data.sources.b.weight=100000"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["data.paths=nope.txt"], ["data.paths", "'nope.txt'", "does not exist"]),
        (["data.paths=[book.txt,nope.txt]"], ["data.paths", "'nope.txt'", "does not exist"]),
        (["data.paths=nope/*.txt"], ["data.paths", "'nope/*.txt'", "matches no file"]),
        (["data.paths=nothing"], ["data.paths", "'nothing'", "holds no"]),
        (["data.paths=empty.txt"], ["data.paths: ", "empty.txt: the file is empty"]),
        (["data.paths=tiny.txt"], ["tokenizer.vocab_size=500", "too few different words"]),
        (["data.paths=latin1.txt"], ["data.paths", "latin1.txt", "not UTF-8"]),
        (['data.paths="no\nsuch"'], ["data.paths", "'no such'", "does not exist"]),
        (["data=jsonl", "data.paths=broken.jsonl"], ["broken.jsonl, line 2", "not valid JSON"]),
        (["data=jsonl", "data.paths=other.jsonl"], ["other.jsonl, line 1", "'text'", "body"]),
        (
            ["data=jsonl", "data.paths=nothing"],
            ["data.paths", "'nothing'", "no .jsonl or .jsonl.gz or"],
        ),
        (["data.validation_paths=nope.txt"], ["data.validation_paths", "'nope.txt'", "does not exist"]),
        (["data.validation_paths=book.txt"], ["data.paths=['book.txt']", "no text left"]),
        (["tokenizer.vocab_size=500000"], ["tokenizer.vocab_size=500000", "the largest that works is"]),
        (["tokenizer.path=nope.model"], ["tokenizer.path", "'nope.model'", "cannot be read"]),
        (["tokenizer.path=book.txt"], ["tokenizer.path", "'book.txt'", "not a sentencepiece"]),
        (["tokenizer.path=nothing"], ["tokenizer.path", "'nothing'", "neither tokenizer.model nor tokenizer.json"]),
        (["data=parquet", "data.paths=other.parquet"], ["data.paths: ", "other.parquet", "no column 'text'", "body"]),
        (["data=parquet", "data.paths=numbers.parquet"], ["numbers.parquet, row group 0, row 0", "string, found int"]),
        (["data=jsonl", "data.paths=cut.jsonl.gz"], ["cut.jsonl.gz, line ", "cut short"]),
        (["data=jsonl", "data.paths=tail.jsonl"], ["tail.jsonl, line 2", "the file ends within this line"]),
        (["data=jsonl", "data.paths=null.jsonl"], ["null.jsonl, line 2", "'text' is null"]),
        (["data=jsonl", "data.paths=nul.jsonl"], ["nul.jsonl, line 2", "NUL at character 1"]),
        (["data=jsonl", "data.paths=surrogate.jsonl"], ["surrogate.jsonl, line 2", "lone surrogate at character 1"]),
        (["data=huggingface", "data.paths=nothing"], ["data.paths=[nothing]", "can not be opened"]),
        (["data=prepared", "data.paths=nothing"], ["data.paths: nothing is no prepared set"]),
        (["data=prepared", "data.paths=nope"], ["data.paths: 'nope' does not exist (looked from "]),
        (
            ["data=jsonl", "data.paths=blank.jsonl", "data.workers=0"],
            ["data.paths: there is no text to train on in it; give files with more text"],
        ),
        (["data=jsonl", "data.paths=rows.jsonl", "data.sources.a.paths=rows.jsonl"], ["data.paths=['rows.jsonl']"]),
        ([*MIXED, "data.sources.a.paths=nope.jsonl"], ["data.sources.a.paths: 'nope.jsonl' does not exist"]),
        ([*MIXED, "data.sources.a.paths=broken.jsonl"], ["data.sources.a.paths: ", "broken.jsonl, line 2"]),
        (
            ["data.paths=[]", *(f"data.sources.{name}.paths=book.txt" for name in "ab"), *WEIGHTS],
            ["data.sources.a.weight=1.0: is less than one row in 10000"],
        ),
        ([*MIXED, "data.sources.a.weight=-1"], ["data.sources.a.weight=-1.0: must not be negative"]),
        (["data=jsonl", "data.paths=[]", "data.sources.a/b.paths=rows.jsonl"], ["data.sources.a/b: name a source"]),
        (["data.epochs=0"], ["data.epochs=0: must be at least 1"]),
        (["data.num_streams=0"], ["data.num_streams=0: must be between 1 and 1024"]),
        (["data.workers=-1"], ["data.workers=-1: must be between 0"]),
        (
            ["data.sequence_length=60000", "model.max_position_embeddings=60000", "trainer.micro_batch_size=1"],
            ["data.sequence_length=60000", "do not fill one row"],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and "=" in value[-1] else "",
)
def test_data_that_can_not_be_trained_on_leaves_nothing_behind(complain, options, words):
    """Catches a traceback out of the data's preparation, and a run directory of a run that never began."""
    said = complain("pretrain", *TEXT, *options)
    for word in words:
        assert word in said


def test_what_a_set_does_not_keep_is_said(complain, place, capsys):
    """Catches weights and the packing that somebody believes to be in the set that was made with them."""
    options = ["prepare", "data=text", "tokenizer.vocab_size=500", "output=set"]
    mixed = ["data.sources.a.paths=book.txt", "data.sources.a.weight=2"]
    said = complain(*options, *mixed)
    assert said.startswith("data.sources.a.weight=2.0: a prepared set keeps all of its text and no weights;")
    cut = ["data.packing=best_fit", "data.sequence_length=64", "data.workers=0"]
    assert cli.main([*options, "data.paths=book.txt", *cut]) == 0
    assert (
        "\nnote: data.sequence_length and data.packing: how rows are cut is no part of a set" in capsys.readouterr().out
    )
    assert cli.main([*options, "data.paths=book.txt", "data.workers=0"]) == 0
    assert "note:" not in capsys.readouterr().out


def test_prepared_data_survives_a_later_mistake(place, capsys):
    """Catches a mistake that deletes a directory which was there before."""
    (place / "runs/stdlib/data").mkdir(parents=True)
    (place / "runs/stdlib/data/precious").write_text("hours of work")
    assert cli.main(["pretrain", *TEXT, "data.paths=nope.txt"]) == 2
    assert (place / "runs/stdlib/data/precious").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_there_is_named(complain):
    """Catches torch's own error after the data were prepared; each command names its own field."""
    assert complain("pretrain", *TEXT, "trainer.device=cuda").startswith("trainer.device=cuda: no CUDA device")
    assert complain("generate", "checkpoint=nothing", "device=cuda").startswith("device=cuda: no CUDA device")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "foo"}, "WORLD_SIZE=foo in the environment: must be a whole number; unset WORLD_SIZE"),
        ({"RANK": "-1"}, "RANK=-1 in the environment: must be a whole number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment: RANK and MASTER_ADDR and MASTER_PORT must be set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR must be set beside it"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"},
            "MASTER_PORT=http in the environment: must be a whole number",
        ),
        ({"RANK": "3"}, "RANK=3 in the environment: must be less than WORLD_SIZE=1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_part_of_a_launchers_variables_is_named(complain, monkeypatch, environment, words):
    """Catches a traceback of torch's rendezvous, or an hour's wait for processes that nobody has started."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert words in complain("pretrain", *TEXT)


def test_a_tokenizer_with_more_ids_than_the_model_is_named(complain, place):
    """Catches an id that no row of the embedding stands for, found when a batch holds it."""
    write_tokenizer(place / "characters")
    said = complain("pretrain", *TEXT, "tokenizer.path=characters", "model.vocab_size=19")
    assert said == "model.vocab_size=19: must be at least the tokenizer's vocabulary, 20."


def test_a_stream_whose_text_has_changed_is_named(complain, place):
    """Catches a stream that goes on, by what its checkpoint remembers, in the middle of another text."""
    options = [*TEXT, "data.streaming=true", "data.workers=0"]
    loaded = load("pretrain", options)
    prepare(loaded.data, loaded.tokenizer, place / "runs/stdlib")
    with (place / "book.txt").open("a") as book:
        book.write("one more line\n")
    said = complain("pretrain", *options)
    assert said.startswith("data.paths: its files are not those that runs/stdlib began to stream; bring the old text")
    assert said.endswith("or give another run_name=.")


# Directories


@pytest.mark.parametrize("directory", ["book.txt", "book.txt/runs", "/proc/nope"])
def test_an_output_directory_that_can_not_be_written_is_named(complain, directory):
    """Catches a run that is lost at its first save."""
    said = complain("pretrain", *TEXT, f"output_dir={directory}")
    assert said.startswith(f"output_dir={directory}: ") and "can not be written" in said


def test_a_foreign_export_directory_is_refused_before_training(complain, place):
    """Catches a run that trains for hours and then can not export, or that replaces what it did not write."""
    (place / "runs/stdlib/hf").mkdir(parents=True)
    (place / "runs/stdlib/hf/thesis.tex").write_text("precious")
    said = complain("pretrain", *TEXT)
    assert said.startswith("runs/stdlib/hf: holds something that is not an export of moe-lm")
    assert "run_name=" in said and "finish.export=false" in said


@pytest.fixture
def run(place: Path) -> Path:
    """The directory of a run that was begun with the options of `TEXT`: a configuration and a checkpoint."""
    directory = place / "runs/stdlib"
    _save_model(directory / "checkpoints", vocab_size=40)
    save(load("pretrain", TEXT), directory / "config.yaml")
    return directory


def _save_model(checkpoints: Path, vocab_size: int) -> None:
    shape = {"vocab_size": vocab_size, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 2}
    model = CausalLM(ModelConfig(**shape))
    slices = [TensorSlice.whole(f"model/{name}", value.detach()) for name, value in model.named_parameters()]
    CheckpointStore(checkpoints, CheckpointConfig()).save(1, slices, {"config": {"model": shape}})


def test_a_run_of_another_configuration_names_the_fields(complain, run):
    """Catches a run that silently goes on as another one, and differences that are named by section only."""
    said = complain("pretrain", *TEXT, "optimizer.learning_rate=0.5", "model.num_experts=4", "data.paths=[empty.txt]")
    assert said.startswith("runs/stdlib was started with another configuration: ")
    for change in (
        "optimizer.learning_rate=0.003 → 0.5",
        "model.num_experts=8 → 4",
        "data.paths=['book.txt'] → ['empty.txt']",
    ):
        assert change in said
    assert "trainer" not in said and "run_name=" in said


def test_a_run_that_must_not_be_resumed_is_refused(complain, run):
    """Catches `resume=never` overwriting a run."""
    assert complain("pretrain", *TEXT, "resume=never").startswith("resume=never: runs/stdlib holds a run already")


@pytest.mark.parametrize(
    "content", ["", "- a\n", "{", "seed: [1\n", "seed: many\n", "unknown: 1\n", "a", "\x00", "x: é\xff"]
)
def test_a_damaged_saved_configuration_is_named(complain, run, content):
    """Catches a traceback out of YAML, or a damaged file taken for agreement."""
    (run / "config.yaml").write_bytes(content.encode("latin-1"))
    said = complain("pretrain", *TEXT)
    assert "runs/stdlib" in said and (
        "is no configuration that this version reads" in said or "another configuration" in said
    )


def test_checkpoints_without_a_configuration_are_not_resumed(complain, run):
    """Catches a run whose configuration was lost and that goes on under any other."""
    (run / "config.yaml").unlink()
    assert "config.yaml: is missing; bring it back" in complain("pretrain", *TEXT)


@pytest.fixture
def prepared(run: Path) -> Path:
    """The same run with its data, whose checkpoint says what a run's does and holds tensors of another model."""
    loaded = load("pretrain", TEXT)
    prepare(replace(loaded.data, workers=0), loaded.tokenizer, run)
    data = open_set(run)
    state = {"progress": asdict(Progress(step=1)), "losses": [], "data": {}, "environment": {"processes": 1}}
    state |= {"config": to_plain(loaded), "corpus_fingerprint": data.corpus_fingerprint}
    state |= {"tokenizer_fingerprint": data.tokenizer.fingerprint}
    store = CheckpointStore(run / "checkpoints", CheckpointConfig())
    store.save(1, [TensorSlice.whole("model/other", torch.zeros(1))], state)
    return run


def test_a_run_without_a_checkpoint_to_trust_is_not_begun_anew(complain, prepared):
    """Catches a run that starts again from nothing, and replaces what could have been mended."""
    (prepared / "checkpoints/step-00000001/state.json").write_text("{}")
    said = complain("pretrain", *TEXT, "data.workers=0")
    assert said == (
        "runs/stdlib/checkpoints: none of its checkpoints can be trusted; bring a good copy back, or give another "
        "run_name= to start anew."
    )


def test_a_checkpoint_of_another_model_is_not_gone_on_with(complain, prepared):
    """Catches tensors of another run, whole by themselves, that are loaded as far as they fit."""
    said = complain("pretrain", *TEXT, "data.workers=0")
    assert said.startswith("runs/stdlib/checkpoints/step-00000001: model/") and "is missing; " in said
    assert said.endswith("; resume.allow_change does not cover these.")


# Other commands


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("part=0/4", "part=0/4: must be i/n with i from 1 to n, such as 2/8."),
        ("part=5/4", "part=5/4: must be i/n with i from 1 to n"),
        ("part=2", "part=2: must be i/n with i from 1 to n"),
        ("data=prepared", "data.source=prepared: is prepared already; give the text to prepare."),
        (
            "data.streaming=true",
            "data.streaming=true: a stream is not prepared; leave it out, or give it to `pretrain`",
        ),
        ("output=book.txt/set", "output=book.txt/set: can not be written (book.txt/set: Not a directory); make room"),
    ],
)
def test_what_can_not_be_prepared_is_named(complain, given, words):
    """Catches a share of the work that nobody does, and a set that is made of another or of nothing."""
    options = ["data=text", "data.paths=book.txt", "data.workers=0", "output=set"]
    assert complain("prepare", *options, given).startswith(words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("against=", "against='': give a path, or null."),
        ("output=", "output='': give a path, or null."),
        ("against=nothing", "against=nothing: is for an export, and runs/stdlib is a native checkpoint; leave it out."),
        ("output=nothing", "output=nothing: is a directory; give the name of a file."),
        ("output=runs/stdlib/x.json", "output=runs/stdlib/x.json: lies in checkpoint=runs/stdlib, which is left as it"),
        ("output=nope/x.json", "output=nope/x.json: there is no directory nope; make it, or give another one."),
    ],
)
def test_a_receipt_that_has_no_place_is_named(complain, run, given, words):
    """Catches hours of checks whose receipt can not be written, or lies in what it is about."""
    assert complain("verify", "checkpoint=runs/stdlib", given).startswith(words)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_named(complain, seed):
    """Catches torch's own error after the base was read."""
    said = complain("upcycle", "checkpoint=nothing", "output=x", f"seed={seed}")
    assert said == f"seed={seed}: must not be negative, and must be below 2**63."


def test_a_base_without_its_tokenizer_is_named(complain, place):
    """Catches a base that goes on learning with ids of another tokenizer."""
    _save_model(place / "bare/checkpoints", vocab_size=4096)
    said = complain("finetune", "base=bare", "data=text", "data.paths=book.txt")
    assert said == "base=bare: there is no tokenizer beside it; give tokenizer.path=…, the one that it needs."


@pytest.mark.parametrize("command", ["export", "generate"])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("checkpoint=nope", "checkpoint=nope: there is no such directory"),
        ("checkpoint=book.txt", "checkpoint=book.txt: is no directory; give the one that it lies in"),
        ("checkpoint=nothing", "checkpoint=nothing: holds no complete checkpoint"),
        (f"checkpoint={'x' * 256}", "can not be a path (File name too long)"),
        ("checkpoint=", "checkpoint: is required"),
        ("checkpoint=null", "checkpoint: is required"),
        ("+checkpoint=nope", "checkpoint=nope: there is no such directory"),
    ],
)
def test_sources_that_are_no_models_are_named(complain, command, source, words):
    """Catches a traceback for a wrong path."""
    assert words in complain(command, source)


@pytest.mark.parametrize("command", ["export", "generate"])
def test_a_source_is_required(complain, command):
    """Catches a command that falls back to some directory."""
    assert complain(command) == "checkpoint: is required; give checkpoint=DIRECTORY."


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("top_k=0", "top_k=0: must be at least 1"),
        ("top_k=-5", "top_k=-5: must be at least 1"),
        ("top_k=all", "top_k=all: must be a whole number or null"),
        ("temperature=-0.1", "temperature=-0.1: must not be negative"),
        ("temperature=nan", "temperature=nan: must be a finite number"),
        ("temperature=inf", "temperature=inf: must be a finite number"),
        ("max_new_tokens=0", "max_new_tokens=0: must be at least 1"),
        ("max_new_tokens=null", "max_new_tokens=null: must be a whole number"),
        ("seed=-1", "seed=-1: must not be negative"),
        (f"seed={2**63}", "must be below 2**63"),
        ("device=tpu", "device=tpu: must be one of auto, cpu, cuda"),
        ("precision=int8", "precision=int8: must be one of auto, bf16, fp32"),
        ("batch_size=0", "batch_size=0: must be at least 1"),
        ("prompts=none.jsonl", "prompts=none.jsonl: can not be read"),
        ("prompts=", "prompts='': give a file, or null"),
    ],
)
def test_sampling_options_out_of_range_are_named(complain, given, words):
    """Catches torch's own error from the middle of sampling."""
    assert words in complain("generate", "checkpoint=nothing", given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("dtype=fp16", "dtype=fp16: must be one of fp32, bf16"),
        ("output=", "output='': give a directory"),
        ("base=", "base='': give the directory"),
    ],
)
def test_export_options_out_of_range_are_named(complain, given, words):
    """Catches a type that nobody writes, and an output that is the present directory by accident."""
    assert words in complain("export", "checkpoint=nothing", given)


def test_export_refuses_what_it_must_not_replace(complain, run, place):
    """Catches an export over a file or a foreign directory, named before any tensor is read."""
    assert complain("export", f"checkpoint={run}", "output=book.txt").startswith("book.txt: can not be an output")
    said = complain("export", f"checkpoint={run}", f"output={place}")
    assert said.startswith(f"{place}: holds something that is not an export") and "output=" in said
    assert "book.txt is not a directory" in complain("export", f"checkpoint={run}", "output=book.txt/hf")


def test_a_model_without_its_tokenizer_is_named(complain, run):
    """Catches a checkpoint copied out of its run, or a run whose tokenizer was deleted."""
    for source in (run, run / "checkpoints/step-00000001"):
        assert f"no tokenizer.model in {run}/tokenizer" in complain("export", f"checkpoint={source}")


def test_a_damaged_checkpoint_is_named(complain, run):
    """Catches a damaged file that is exported, or that ends in a traceback."""
    checkpoint = run / "checkpoints/step-00000001"
    (checkpoint / "state.json").write_text("{}")
    for command in ("export", "generate"):
        said = complain(command, f"checkpoint={checkpoint}")
        assert said.startswith(f"checkpoint={checkpoint}: state.json has 2 bytes instead of")


def test_a_checkpoint_of_another_program_is_named(complain, place, capsys):
    """Catches a KeyError for a checkpoint that holds no model of ours."""
    path = CheckpointStore(place / "checkpoints", CheckpointConfig()).save(
        1, [TensorSlice.whole("x", torch.zeros(1))], {}
    )
    for command in ("export", "generate"):
        assert "was not written by moe-lm" in complain(command, f"checkpoint={path}")
    assert cli.main(["verify", f"checkpoint={path}"]) == 1
    said = capsys.readouterr()
    assert f"{path}: REFUSED: state.json: has no configuration of a run\n" in said.out
    assert said.err == f"moe-lm: checkpoint={path}: 1 can not be trusted (step-00000001)\n"


def test_a_checkpoint_of_an_absurd_configuration_is_named(complain, place, capsys):
    """Catches a reader that builds every layer before it looks at the files, and a configuration that is none."""
    store = CheckpointStore(place / "checkpoints", CheckpointConfig())
    config = {"model": {"num_hidden_layers": 1000}, "optimizer": {}}
    path = store.save(1, [TensorSlice.whole("model/x", torch.zeros(1))], {"config": config})
    for command in ("export", "generate"):
        said = complain(command, f"checkpoint={path}")
        assert said == f"checkpoint={path}: has fewer tensors than its configuration has layers."
    assert cli.main(["verify", f"checkpoint={path}"]) == 1
    assert f"{path}: REFUSED: has fewer tensors than its configuration has layers\n" in capsys.readouterr().out
    path = store.save(2, [TensorSlice.whole("model/x", torch.zeros(1))], {"config": {"model": 3}})
    for command in ("export", "generate"):
        assert complain(command, f"checkpoint={path}").startswith("configuration: ")


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": "llama"}', '{"model_type": "mixtral"}'])
def test_a_hugging_face_directory_that_can_not_be_read_is_named(complain, place, content):
    """Catches a traceback for a model of another kind."""
    (place / "model").mkdir()
    (place / "model/config.json").write_text(content)
    assert complain("generate", "checkpoint=model").startswith("model/config.json: ")


def test_a_relative_checkpoint_finds_its_run(run, monkeypatch, complain):
    """Catches the parent of a relative path, which is not the directory above it."""
    monkeypatch.chdir(run / "checkpoints/step-00000001")
    assert f"no tokenizer.model in {run}/tokenizer" in complain("export", "checkpoint=.")
    monkeypatch.chdir(run / "checkpoints")
    assert f"no tokenizer.model in {run}/tokenizer" in complain("export", "checkpoint=step-00000001")


def test_the_fixture_itself_is_valid(place):
    """Catches a table of mistakes in which something else was wrong all along."""
    loaded = load("pretrain", TEXT)
    assert loaded.trainer.max_steps == 2 and loaded.data.paths == ["book.txt"]
    assert (place / "book.txt").stat().st_size > 50_000
