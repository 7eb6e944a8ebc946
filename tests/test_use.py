"""lab/text/use.py and tables.py: a saved model predicts every kind of file, shows its routing, and refuses damaged input."""

import csv
import json
import math
import re
import shutil

import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel, BertTokenizerFast

from lab.moe.moefication import MoESpec, moefy
from lab.run.cli import UserError
from lab.text import use
from stgc import route
from stgc_plus import STGC, STGCConfig

WORDS = "a the cat dog bird fish sees likes eats not red blue".split()
LONG = "x" * 30
CONFIG = dict(  # noqa: C408
    vocab_size=6 + len(WORDS),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    initializer_range=0.4,  # answers that differ
)
COLUMNS, LABELS = ["sentence1", "sentence2"], ["entailment", "not_entailment"]
SENTENCES = [" ".join(WORDS[(i * 7 + j * (i + 1)) % len(WORDS)] for j in range(2 + i % 6)) for i in range(9)]
EXAMPLES = [{"sentence1": SENTENCES[i], "sentence2": SENTENCES[-i - 1], "label": i % 2} for i in range(6)]


def save(folder, moe=True, num_labels=2, labels=LABELS, examples=EXAMPLES, **spec):
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, LONG]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    model = BertForSequenceClassification(BertConfig(**CONFIG, num_labels=num_labels)).eval()
    if moe:
        model = moefy(model, MoESpec(**{"layers": "all", "num_experts": 4} | spec))
        for layer in STGC(model).layers:
            for parameter in layer.router.parameters():
                parameter.data *= 4  # choices far from a tie
    model.save_pretrained(folder)
    use.write_task_card(folder, "rte", tuple(COLUMNS), num_labels, 12, labels, examples)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(5)  # both classes are predicted
    folder = tmp_path_factory.mktemp("run")
    save(folder / "model-ce-s0")
    return folder


def direct(folder, rows):
    """Logits of each pair alone: no batch, no padding."""
    model, tokenizer, _ = use.load_saved(folder)
    out = [model(**tokenizer(*pair, truncation=True, max_length=12, return_tensors="pt")).logits[0] for pair in rows]
    return torch.stack(out).detach()


def write_table(file, rows):
    """By other means than lab/text/tables.py."""
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".tsv":
        file.write_text("\n".join("\t".join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)]) + "\n")
    elif file.suffix == ".csv":
        with open(file, "w", newline="") as out:
            csv.writer(out, quoting=csv.QUOTE_ALL).writerows([rows[0], *(row.values() for row in rows)])
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_table(file):
    if file.suffix == ".parquet":
        return parquet.read_table(file).to_pylist()
    if file.suffix == ".csv":
        with open(file, newline="") as lines:
            return list(csv.DictReader(lines))
    lines = file.read_bytes().decode().split("\n")[:-1]
    if file.suffix == ".tsv":
        return [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    return [json.loads(line) for line in lines]


NASTY = [
    "NA",
    "",
    "  ",
    "a\rdog",
    "007",
    "2020-01-01",
    'the "cat", he said',
    '"',
    "ça, 猫 🐈",
    " \t the cat ",
    "null",
    "a\u2028dog",
    "x\nthe\r\nbird",
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".CSV"])
def test_every_format_keeps_its_rows_and_gets_the_models_probabilities(run, tmp_path, suffix):
    typed = suffix not in (".csv", ".tsv", ".CSV")
    rows = [
        {"id": i if typed else f"0{i}", "sentence1": text, "sentence2": SENTENCES[i % 9], "note": None if typed else ""}
        for i, text in enumerate(NASTY + SENTENCES)
    ]
    if suffix == ".tsv":  # a tab or a line break is what a tsv cannot hold
        rows = [row for row in rows if not re.search("[\t\n]", row["sentence1"])]
    file, out = tmp_path / f"pairs [1]{suffix}", tmp_path / f"pairs [1].predictions{suffix}"
    write_table(file.with_suffix(suffix.lower()), rows)
    file.with_suffix(suffix.lower()).rename(file)
    said = use.predict(run, file, batch_size=4)
    blank = sum(not row["sentence1"].strip() for row in rows)
    said, warning = said.split("\n")
    assert said == f"written: {out}, {len(rows)} rows, {blank} of them with an empty sentence" and blank == 2
    assert re.fullmatch(r"warning: \d+ of \d+ tokens are unknown to the model, which reads each as \[UNK\]", warning)
    assert sorted(tmp_path.iterdir()) == sorted([file, out])
    out.rename(out.with_suffix(suffix.lower()))
    found = read_table(out.with_suffix(suffix.lower()))
    added = ["prediction", "probability_entailment", "probability_not_entailment"]
    assert [{name: row[name] for name in row if name not in added} for row in found] == rows
    assert all(list(row)[-3:] == added for row in found)
    assert all(round(float(row[name]), 6) == float(row[name]) for row in found for name in added[1:]), "6 digits"
    probs = direct(run / "model-ce-s0", [(row["sentence1"], row["sentence2"]) for row in rows]).softmax(-1)
    assert len({round(p, 4) for p in probs[:, 0].tolist()}) > 8, "a wrong order would not show"
    torch.testing.assert_close(
        torch.tensor([[float(row[a]) for a in added[1:]] for row in found]), probs, rtol=1e-5, atol=1e-6
    )
    assert [row["prediction"] for row in found] == [LABELS[i] for i in probs.argmax(-1)]
    assert len({row["prediction"] for row in found}) == 2
    assert suffix == ".parquet" or "猫" in out.with_suffix(suffix.lower()).read_text(), "unreadable"


def test_unknown_words_are_counted(run, tmp_path):
    write_table(tmp_path / "a.csv", [{"sentence1": "the cat", "sentence2": "a dog"}])
    assert "warning" not in use.predict(run, tmp_path / "a.csv")
    write_table(tmp_path / "b.csv", [{"sentence1": "the stoat", "sentence2": "a cat"}] * 2)
    assert use.predict(run, tmp_path / "b.csv").endswith(
        "warning: 2 of 14 tokens are unknown to the model, which reads each as [UNK]"
    )


def test_parquet_keeps_its_types(run, tmp_path):
    columns = {
        "sentence1": pyarrow.array(["the"], pyarrow.large_string()),
        "sentence2": pyarrow.array(["a"]).dictionary_encode(),
    }
    table = pyarrow.table(columns | {"at": pyarrow.array([1], pyarrow.timestamp("ns"))}).replace_schema_metadata(
        {"mine": "1"}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    use.predict(run, tmp_path / "a.parquet")
    written = parquet.read_table(tmp_path / "a.predictions.parquet")
    assert written.select(table.column_names).equals(parquet.read_table(tmp_path / "a.parquet"), check_metadata=True)


def test_batches_hold_inputs_of_similar_length(run):
    shapes = []
    model, tokenizer, card = use.load_saved(run / "model-ce-s0")
    model.register_forward_pre_hook(
        lambda model, args, batch: shapes.append(tuple(batch["input_ids"].shape)), with_kwargs=True
    )
    texts = ["the cat " * n for n in (1, 5, 2, 4, 1, 5)]
    encoded = tokenizer(texts, ["a"] * 6, truncation=True, max_length=12)
    assert use.compute_logits(model, tokenizer, encoded, 2, "cpu").shape == (6, 2)
    assert shapes == [(2, 12), (2, 12), (2, 6)]  # [CLS] 2n [SEP] a [SEP], cut to 12


def test_json_keeps_what_it_can_hold(run, tmp_path):
    rows = [dict(zip(COLUMNS, ("the", "a"))) | row for row in ({"id": "\ud800", "list": [1, 1.0, None]}, {"other": True})]
    write_table(tmp_path / "a.jsonl", rows)
    use.predict(run, tmp_path / "a.jsonl")
    found = read_table(tmp_path / "a.predictions.jsonl")
    assert [list(row.items())[:-3] for row in found] == [list(row.items()) for row in rows]


def test_one_column_blank_lines_and_the_mark_that_excel_writes(tmp_path):
    torch.manual_seed(1)
    save(tmp_path / "m", moe=False, num_labels=3, labels=None)
    card = json.loads((tmp_path / "m" / "task.json").read_text())
    examples = [{"sentence": "the cat", "label": 2}]
    (tmp_path / "m" / "task.json").write_text(json.dumps(card | {"columns": ["sentence"], "examples": examples}))
    for suffix in ("csv", "tsv"):
        (tmp_path / f"a.{suffix}").write_bytes("\ufeffsentence\r\nthe\r\n\r\ndog\r\n".encode())
        assert "3 rows, 1 of them with an empty" in use.predict(tmp_path / "m", tmp_path / f"a.{suffix}")
        lines = (tmp_path / f"a.predictions.{suffix}").read_text().replace('"', "").splitlines()
        head, *found = [re.split("[,\t]", line) for line in lines]
        assert head == ["sentence", "prediction", *(f"probability_{i}" for i in range(3))]
        assert [row[0] for row in found] == ["the", "", "dog"] and {row[1] for row in found} <= {"0", "1", "2"}
        assert b"\r" not in (tmp_path / f"a.predictions.{suffix}").read_bytes()
    (tmp_path / "mac.csv").write_bytes(b"sentence\rthe\rdog\r")
    assert "2 rows" in use.predict(tmp_path / "m", tmp_path / "mac.csv")
    (tmp_path / "b.csv").write_text("id,sentence\n1,the\n\n2,dog\n\n")
    assert "2 rows" in use.predict(tmp_path / "m", tmp_path / "b.csv")


def test_a_dense_regression_predicts_numbers(tmp_path):
    save(tmp_path / "m", moe=False, num_labels=1, labels=None, examples=[])
    rows = [dict(zip(COLUMNS, pair)) for pair in zip(SENTENCES, SENTENCES[::-1])]
    write_table(tmp_path / "a.jsonl", rows)
    use.predict(tmp_path / "m", tmp_path / "a.jsonl", tmp_path / "to.jsonl")
    found = read_table(tmp_path / "to.jsonl")
    expected = direct(tmp_path / "m", [row.values() for row in rows])[:, 0]
    assert [list(row) for row in found] == [[*COLUMNS, "prediction"]] * 9
    torch.testing.assert_close(torch.tensor([row["prediction"] for row in found]), expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_diverged_is_called_out(tmp_path):
    model = save(tmp_path / "m", moe=False)
    (tmp_path / "a.csv").write_text("sentence1,sentence2\nthe,cat\n")
    for value, message in ((math.nan, "weight classifier.weight is not finite"), (3e38, "outputs are not finite")):
        model.classifier.weight.data.fill_(value)
        model.save_pretrained(tmp_path / "m")
        assert message in refused(use.predict, tmp_path / "m", tmp_path / "a.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "m"]


def refused(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_files_are_named_and_nothing_is_written(run, tmp_path):
    good = "sentence1,sentence2\nthe,cat\n"
    cases = {
        "a.csv": {
            "needs the columns sentence1, sentence2; the file has sentence, x": "sentence,x\n1,2\n",
            "already has a column prediction": "sentence1,sentence2,prediction\na,b,c\n",
            "row 2 has 3 fields, the header has 2": good + "the, bird,sees\n",
            "row 1 has 1 fields, the header has 2": "sentence1,sentence2\nthe\n",
            "cannot be read as .csv (unexpected end of data": good + '"the,cat\n',
            "'sentence1' is there twice": "sentence1,sentence1\na,b\n",
            "has no rows": "sentence1,sentence2\n",
            "cannot be read as .csv ('utf-8' codec": b"sentence1,sentence2\n\xff,a\n",
        },
        "a.tsv": {"has no rows": "", "row 1 has 3 fields": 'sentence1\tsentence2\n"a\tb"\tc\n'},
        "a.jsonl": {
            "line 2 is not a JSON object": '{"sentence1": "a", "sentence2": "b"}\n["a", "b"]\n',
            "line 1 is not a JSON object": "[\n",
            "sentence2 of row 2 is null": '{"sentence1": "a", "sentence2": "b"}\n\n{"sentence1": "a"}\n',
            "sentence1 of row 1 is a int": '{"sentence1": 5, "sentence2": "b"}\n',
            "sentence1 of row 1 is broken Unicode": '{"sentence1": "\\ud800", "sentence2": "b"}\n',
        },
        "a.parquet": {"cannot be read as .parquet": "PAR1"},
        "a.txt": {"must end in one of .csv, .tsv": good},
    }
    for name, contents in cases.items():
        for message, content in contents.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            text = refused(use.predict, run, tmp_path / name)
            assert text.startswith(f"--predict {tmp_path / name}") and message in text, text
        (tmp_path / name).unlink()
    assert "no such file" in refused(use.predict, run, tmp_path / "a.csv")
    assert not list(tmp_path.iterdir())


def test_no_file_is_replaced(run, tmp_path, monkeypatch):
    file = tmp_path / "a.csv"
    file.write_text("sentence1,sentence2\nthe,cat\n")
    (tmp_path / "a.predictions.csv").write_text("mine")
    assert "a.predictions.csv exists already" in refused(use.predict, run, file)
    assert "a.csv exists already" in refused(use.predict, run, file, file)
    assert "must end in .csv" in refused(use.predict, run, file, tmp_path / "b.tsv")
    with monkeypatch.context() as patch:
        patch.setattr(use, "load_saved", lambda *_: pytest.fail("noticed only after the work"))
        assert "b.csv cannot be written (No such file" in refused(use.predict, run, file, tmp_path / "none" / "b.csv")
    monkeypatch.setattr(use, "write_rows", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert "b.csv cannot be written (No space left)" in refused(use.predict, run, file, tmp_path / "b.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.predictions.csv"]
    assert (tmp_path / "a.predictions.csv").read_text() == "mine" and file.read_text().endswith("the,cat\n")


def test_models_are_found_or_their_lack_is_explained(run, tmp_path):
    model = run / "model-ce-s0"
    assert use.find_model(run) == use.find_model(model) == model
    (tmp_path / "model-a-s0").mkdir()
    (tmp_path / "model-b-s1").mkdir()
    text = refused(use.find_model, tmp_path, "--inspect")
    assert "model-a-s0, model-b-s1" in text and text.endswith(f"--inspect {tmp_path / 'model-a-s0'}")
    (tmp_path / "none").mkdir()
    assert "train with --save-model" in refused(use.predict, tmp_path / "none", tmp_path / "a.csv")
    assert refused(use.inspect, tmp_path / "nowhere").startswith(f"--inspect {tmp_path / 'nowhere'}: no such folder")


@pytest.mark.parametrize("moe", [True, False])
def test_damaged_models_are_refused(tmp_path, moe):
    """Whatever file is cut or gone: never a model with random weights, or an empty vocabulary."""
    save(tmp_path / "m", moe=moe)
    damages = [
        (name, how) for name in ("config.json", "model.safetensors", "tokenizer.json", "task.json") for how in (cut, gone)
    ]
    for name, damage in damages:
        shutil.copytree(tmp_path / "m", tmp_path / "bad")
        damage(tmp_path / "bad" / name)
        text = refused(use.load_saved, tmp_path / "bad", "--inspect")
        assert text.startswith("--inspect") and str(tmp_path / "bad") in text and "--save-model" in text, text
        shutil.rmtree(tmp_path / "bad")
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    gone(tmp_path / "m" / "model.safetensors")
    assert "safetensors" in refused(use.load_saved, tmp_path / "m")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def gone(path):
    path.unlink()


def test_a_model_that_does_not_fit_its_card_is_refused(tmp_path):
    save(tmp_path / "m", moe=False)
    card = json.loads((tmp_path / "m" / "task.json").read_text())
    (tmp_path / "m" / "task.json").write_text(json.dumps(card | {"num_labels": 3, "labels": None}))
    assert "BertForSequenceClassification of 2 labels, task.json has 3" in refused(use.load_saved, tmp_path / "m")
    (tmp_path / "m" / "task.json").write_text(json.dumps(card))
    BertModel(BertConfig(**CONFIG)).save_pretrained(tmp_path / "m")
    assert "its weights lack classifier.bias" in refused(use.load_saved, tmp_path / "m")
    moefy(BertForTokenClassification(BertConfig(**CONFIG)), MoESpec("0")).save_pretrained(tmp_path / "m")
    assert "BertForTokenClassification of 2 labels" in refused(use.load_saved, tmp_path / "m")
    BertForSequenceClassification(BertConfig(**CONFIG | {"vocab_size": 9})).save_pretrained(tmp_path / "m")
    assert "its tokenizer has 18 tokens, the model 9" in refused(use.load_saved, tmp_path / "m")


def test_cards_are_read_back_or_refused(tmp_path):
    good = {"task": "rte", "columns": COLUMNS, "num_labels": 2, "max_length": 12, "labels": LABELS, "examples": EXAMPLES}
    use.write_task_card(tmp_path, **good)
    assert use.read_task_card(tmp_path) == use.TaskCard(**good)
    assert json.loads((tmp_path / "task.json").read_text()) == good
    row = EXAMPLES[0]
    bad = [("columns", value) for value in ([], "sentence1", ["a", "a"], ["a", "b", "c"], [5])]
    bad += [("labels", value) for value in (["x"], ["x", "x"], ["x", ""], ["x", "\x1b[2J"], "ab")]
    bad += [
        ("examples", [value]) for value in ({**row, "label": 2}, {**row, "label": 0.5}, {**row, "sentence1": None}, {}, 7)
    ]
    bad += [("num_labels", 0), ("num_labels", "2"), ("num_labels", 1), ("max_length", 1.5), ("task", None)]
    for name, value in bad:
        (tmp_path / "task.json").write_text(json.dumps(good | {name: value}))
        assert "--run: task.json of" in refused(use.read_task_card, tmp_path), (name, value)
    with pytest.raises(ValueError, match="columns"):
        use.write_task_card(tmp_path, **good | {"columns": []})
    (tmp_path / "task.json").write_text("[]")
    assert "--run: task.json of" in refused(use.read_task_card, tmp_path)


def parse(text):
    """{(layer, example): [(token, [(expert, weight, mark), ...]), ...]} of what inspect printed."""
    blocks = {}
    for block in text.split("\n\n"):
        head, *lines = block.split("\n")
        if found := re.fullmatch(r"MoE layer (\S+), example (\d+)", head):
            rows = []
            for line in lines:
                cells = re.findall(r"   +(\d+) (\d\.\d\d) ?(! [+-]\d\.\d\d|-)?", line[2:])
                token = line[2:22].rstrip()
                rows = rows + [(token, cells)] if token else rows[:-1] + [(rows[-1][0], rows[-1][1] + cells)]
            blocks[found[1], int(found[2]) - 1] = rows
    return blocks


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"experts": "split", "top_k": 3, "num_experts": 16, "normalize": False},
        {"router": "cosine", "top_k": 8, "num_experts": 8},
    ],
)
def test_inspect_shows_what_stgc_finds(tmp_path, spec):
    """Against the one-pass method and a plain forward: tokens, experts, weights, flags, answers; and no padding."""
    torch.manual_seed(3)
    save(tmp_path / "m", **spec)
    text = use.inspect(tmp_path / "m")
    assert max(map(len, text.split("\n"))) <= 100 and text.isascii()
    model, tokenizer, card = use.load_saved(tmp_path / "m")
    batch = tokenizer(
        *([row[name] for row in EXAMPLES] for name in COLUMNS),
        padding=True,
        truncation=True,
        max_length=12,
        return_tensors="pt",
    )
    stgc, inputs = STGC(model, STGCConfig(passes="one")), []
    hooks = [layer.register_forward_hook(lambda layer, args, out: inputs.append(args[0].detach())) for layer in stgc.layers]
    out = model(**batch, labels=torch.tensor([row["label"] for row in EXAMPLES]))
    stgc.loss(out.loss).backward()
    lengths, blocks, conflicts = batch["attention_mask"].sum(1).tolist(), parse(text), 0
    assert len(hooks) == 2 and len(blocks) == 2 * len(EXAMPLES) and len(set(lengths)) > 1 and "[PAD]" not in text
    for name, layer, x_BLD, verdict, stats in zip(stgc.names, stgc.layers, inputs, stgc.verdicts, stgc.stats()):
        with torch.no_grad():
            routing = route(layer.router, x_BLD.flatten(0, 1), layer.top_k, layer.normalize, layer.scale)
        for b, length in enumerate(lengths):
            rows = blocks[name, b]
            assert [token for token, _ in rows] == tokenizer.convert_ids_to_tokens(batch["input_ids"][b, :length].tolist())
            for t, (_, cells) in enumerate(rows, start=b * x_BLD.shape[1]):
                for k, (expert, weight, mark) in enumerate(cells):
                    assert int(expert) == routing.expert_ids_TK[t, k]
                    assert float(weight) == pytest.approx(routing.weights_TK[t, k].item(), abs=0.006)
                    assert mark.startswith("!") == verdict.conflict_TK[t, k].item(), (b, t, k)
                    assert (mark == "-") == (not verdict.judged_TK[t, k])
                    if mark.startswith("!"):
                        assert float(mark[2:]) == pytest.approx(verdict.similarity_TK[t, k].item(), abs=0.006)
                        conflicts += 1
                assert len(cells) == layer.top_k
        head = text.split(f"MoE layer {name}: ")[1].split("\n\n")[0]
        assert f"conflict ratio {stats['conflict_ratio']:.3f};" in head
        assert [float(load) for load in re.findall(r"load (\S+)", head)] == pytest.approx(stats["load"], abs=0.006)
        counts = [list(map(int, pair)) for pair in re.findall(r"(\d+) of (\d+) pairs conflict", head)]
        assert [sum(column) for column in zip(*counts)] == [verdict.conflict_TK.sum(), sum(lengths) * layer.top_k]
        bars = [len(bar) for bar in re.findall(r"load \S+ (#*)", head)]
        assert max(bars) == 28 and bars == [round(28 * n / max(counts, key=lambda c: c[1])[1]) for _, n in counts]
        worst = max(range(len(counts)), key=lambda e: counts[e][0] / max(1, counts[e][1]))
        assert f"highest on expert {worst} ({counts[worst][0] / counts[worst][1]:.2f})" in head
    assert conflicts > 10 and re.search(r"\d\.\d\d -", text)
    legend, body = text.split("\n\n")[0], text.split("\n\n", 1)[1]
    for cell, meaning in (("! -", "in conflict: its gradient has cosine -"), ("-  ", "no gradient reaches it")):
        (start,) = re.finditer(rf"^  (\d+ \d\.\d\d {cell}\S*)", legend, re.M)
        assert meaning in legend[start.start() :] and f"   {start[1].rstrip()}" in body, "a cell that is there"
    assert ("cosine router" in legend) == (spec.get("router") == "cosine")
    assert text.rsplit("\n\n", len(stgc.names))[1].startswith(f"MoE layer {stgc.names[0]}: "), "sums stand last"
    for b, probs in enumerate(out.logits.softmax(-1)):
        best = probs.argmax().item()
        wrong = "" if best == EXAMPLES[b]["label"] else " (wrong)"
        line = f"gold {LABELS[EXAMPLES[b]['label']]}, predicted {LABELS[best]} with probability {probs[best]:.2f}{wrong}\n"
        assert f"example {b + 1}: {line}  sentence1: {EXAMPLES[b]['sentence1']}\n" in text


def test_inspect_of_a_regression_and_of_what_has_nothing_to_show(tmp_path):
    examples = [{**row, "label": i} for i, row in enumerate(EXAMPLES)]
    examples[0]["sentence1"] = f"the \x1b[2Jcat {LONG} " + "dog " * 40
    save(tmp_path / "m", num_labels=1, labels=None, examples=examples)
    text = use.inspect(tmp_path / "m")
    logits = direct(tmp_path / "m", [(row["sentence1"], row["sentence2"]) for row in examples])
    assert all(f"example {i + 1}: gold {i:.2f}, predicted {logits[i, 0]:.2f}\n" in text for i in range(6))
    assert "\x1b" not in text and r"the \x1b[2Jcat" in text and len(parse(text)) == 12
    assert max(map(len, text.split("\n"))) <= 100 and f"\n  {LONG[:17]}...   " in text and text.count("dog") > 40
    save(tmp_path / "dense", moe=False)
    assert "is a dense model" in refused(use.inspect, tmp_path / "dense")
    save(tmp_path / "none", examples=[])
    assert "has no examples" in refused(use.inspect, tmp_path / "none")
