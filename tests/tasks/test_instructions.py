"""Text to learn answers from, in every form and from every kind of file; what is none of them is named with its row."""

import csv
import json

import pytest
from datasets import Dataset

from spikegpt_lora.tasks.instructions import load_instructions
from spikegpt_lora.utils.errors import DamagedFile


def said(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = {
    "messages": {"messages": said("who?", "him.")},
    "completion": {"prompt": "who?", "completion": " him."},
    "instruction": {"instruction": "say who", "input": "a film", "output": "him."},
    "no input": {"instruction": "say who", "output": "him."},
    "text": {"text": "it was him."},
}
READ = {
    "messages": {"prompt": said("who?"), "completion": said("him.", first="assistant")},
    "completion": ROWS["completion"],
    "instruction": {"prompt": said("say who\n\na film"), "completion": said("him.", first="assistant")},
    "no input": {"prompt": said("say who"), "completion": said("him.", first="assistant")},
    "text": ROWS["text"],
}


@pytest.mark.parametrize("form", ROWS)
def test_each_form_is_read_as_trl_takes_it(tmp_path, form):
    data = load_instructions(lines(tmp_path / "a.jsonl", ROWS[form], ROWS[form]))
    assert data.keys() == {"train"} and data["train"].to_list() == [READ[form]] * 2


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_each_kind_of_file_is_read(tmp_path, kind):
    rows, path = [{"instruction": "2 + 2", "input": "", "output": "4"}] * 2, tmp_path / f"a.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        lines(path, *rows)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(path)
    answer = {"prompt": said("2 + 2"), "completion": said("4", first="assistant")}
    assert load_instructions(str(path))["train"].to_list() == [answer] * 2


def test_each_answer_of_a_conversation_is_a_row_after_all_that_was_said_before(tmp_path):
    whole = [{"role": "system", "content": "be brief"}, *said("who?", "him.", "when?", "then.")]
    rows = load_instructions(lines(tmp_path / "a.jsonl", {"messages": whole}))["train"].to_list()
    assert rows == [{"prompt": whole[:2], "completion": [whole[2]]}, {"prompt": whole[:4], "completion": [whole[4]]}]


@pytest.mark.parametrize("validation, held", [(0, 0), (3, 3), (0.25, 5), (0.01, 1)])
def test_conversations_are_held_out_whole_by_number_or_by_share(tmp_path, validation, held):
    rows = [{"messages": said(f"{number}?", "so.", "and?", "so too.")} for number in range(20)]
    data = load_instructions(lines(tmp_path / "a.jsonl", *rows), validation)
    asked = {name: {row["prompt"][0]["content"] for row in split.to_list()} for name, split in data.items()}
    assert len(asked["train"]) == 20 - held and len(data["train"]) == 2 * (20 - held)
    assert len(asked.get("validation", ())) == held and not asked["train"] & asked.get("validation", set())


def test_the_split_is_a_function_of_the_seed(tmp_path):
    path = lines(tmp_path / "a.jsonl", *({"text": f"text {number}"} for number in range(50)))
    drawn = [load_instructions(path, 10, seed)["validation"]["text"][:] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


WRONG = [
    ({"messages": None, "foo": 1}, "messages must be a list of role and content, got None"),
    ({"messages": said("who?")}, r"an assistant must answer, the roles are \['user'\]"),
    ({"messages": said("hello", first="assistant")}, r"an assistant must answer, the roles are \['assistant'\]"),
    ({"messages": [{"role": "user", "content": None}]}, "content must be text and not blank, got None"),
    ({"messages": said("who?", " ")}, "content must be text and not blank, got ' '"),
]


@pytest.mark.parametrize("row, message", WRONG)
def test_a_row_that_is_not_of_the_form_is_named_with_file_and_rule(tmp_path, row, message):
    path = lines(tmp_path / "a.jsonl", ROWS["messages"], row, ROWS["messages"])
    with pytest.raises(ValueError, match=rf"a.jsonl row 2: {message}.* \(rows of messages\)"):
        load_instructions(path)


def test_columns_of_no_form_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"columns of one form \(messages; prompt, completion; .*\), has question"):
        load_instructions(lines(tmp_path / "a.jsonl", {"question": "who?"}))


@pytest.mark.parametrize(
    "name, content", [("a.json", '[{"text": '), ("a.parquet", "no"), ("a.jsonl", "no\n"), ("a.jsonl", "")]
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DamagedFile, match=f"{name} is no whole .{name[2:]} file"):
        load_instructions(str(tmp_path / name))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "there.txt"])
def test_a_path_that_is_no_such_file_is_named(tmp_path, name):
    (tmp_path / "there.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match=f"must be a .json, .jsonl, .csv, .parquet file, .* got .*{name}"):
        load_instructions(str(tmp_path / name))


def test_a_dataset_out_of_reach_is_named():
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no file, nor a dataset within reach: HF_HUB_OFF"):
        load_instructions("nobody/nothing")


def test_something_must_be_left_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="must have a row left to train on, has 2, 2 for validation"):
        load_instructions(lines(tmp_path / "a.jsonl", ROWS["text"], ROWS["text"]), 2)
