"""Tests of spikegpt_lora.tasks.baselines: both methods recomputed by hand with numpy, and the figures on real Subj."""

import os
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from spikegpt_lora.tasks.baselines import _logistic_regression, _naive_bayes, bag_of_words_baselines
from spikegpt_lora.tasks.registry import load_task

SHARED = os.environ.get("SPIKEGPT_LORA_DATA")
real_data = pytest.mark.skipif(not SHARED, reason="needs the Subj files: set SPIKEGPT_LORA_DATA to their folder")

TRAIN = [
    ("the spy leaves for rome .", 0),
    ("a spy , a train , a murder .", 0),
    ("the train leaves rome at night", 0),
    ("a fine film , a fine score .", 1),
    ("The script isn't fine", 1),
    ("dull , dull , dull film !", 1),
    ("the film leaves you cold", 1),
]
OTHER = [
    ("a dull train film .", 1),
    ("the spy , the script", 0),
    ("fine night , cold murder !", 0),
    ("unseen words", 1),
]


def split(rows: list[tuple[str, int]]) -> Dataset:
    return Dataset.from_list([{"text": text, "label": label} for text, label in rows])


@pytest.fixture(scope="module")
def dataset() -> DatasetDict:
    return DatasetDict(train=split(TRAIN), validation=split(OTHER[:2]), test=split(OTHER))


@pytest.fixture(scope="module")
def mini() -> DatasetDict:
    return load_task("subj-mini")


def counts(text: str) -> Counter:
    words = text.lower().split()
    return Counter(words) + Counter(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))


def count_matrix(texts: list[str], vocabulary: list[str]) -> np.ndarray:
    """(texts, vocabulary)"""
    return np.array([[count[feature] for feature in vocabulary] for count in map(counts, texts)], dtype=float)


def by_hand(train: Dataset, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of the train texts and of `texts`, (n, V), and the train labels."""
    vocabulary = sorted(set().union(*(counts(text) for text in train["text"])))
    return count_matrix(train["text"], vocabulary), count_matrix(texts, vocabulary), np.array(train["label"])


@pytest.mark.parametrize("name", ["dataset", "mini"])
def test_naive_bayes_equals_counting_by_hand(name, request):
    data = request.getfixturevalue(name)
    train, test, labels = by_hand(data["train"], data["test"]["text"])
    scores = []
    for label in (0, 1):
        n = train[labels == label].sum(axis=0) + 1
        scores.append(np.log(np.mean(labels == label)) + test @ np.log(n / n.sum()))
    pipeline = _naive_bayes().fit(data["train"]["text"], data["train"]["label"])
    assert pipeline.predict(data["test"]["text"]).tolist() == np.argmax(scores, axis=0).tolist()


@pytest.mark.parametrize("name", ["dataset", "mini"])
def test_tfidf_features_equal_counting_by_hand(name, request):
    data = request.getfixturevalue(name)
    train, test, labels = by_hand(data["train"], data["test"]["text"])
    idf = np.log((1 + len(train)) / (1 + (train > 0).sum(axis=0))) + 1
    expected = test * idf
    norm = np.linalg.norm(expected, axis=1, keepdims=True)
    expected /= np.where(norm == 0, 1, norm)
    pipeline = _logistic_regression().fit(data["train"]["text"], labels)
    np.testing.assert_allclose(pipeline[0].transform(data["test"]["text"]).toarray(), expected, rtol=1e-12)


def test_logistic_regression_is_at_its_minimum(mini):
    """The gradient of |w|^2 / 2 + sum log(1 + exp(-z)), recomputed by hand, is 0."""
    train, labels = mini["train"]["text"], np.array(mini["train"]["label"])
    pipeline = _logistic_regression().fit(train, labels)
    x, w, b = pipeline[0].transform(train).toarray(), pipeline[-1].coef_[0], pipeline[-1].intercept_[0]
    residual = 1 / (1 + np.exp(-(x @ w + b))) - labels  # (n,)
    assert max(np.abs(x.T @ residual + w).max(), abs(residual.sum())) < 1e-4 * len(train)  # the solver's tol


def test_accuracies_are_those_of_the_predictions(dataset):
    results = bag_of_words_baselines(dataset)
    for result, pipeline in zip(results, (_naive_bayes(), _logistic_regression()), strict=True):
        pipeline.fit(dataset["train"]["text"], dataset["train"]["label"])
        for name in ("validation", "test"):
            right = pipeline.predict(dataset[name]["text"]) == np.array(dataset[name]["label"])
            assert result[f"accuracy_{name}"] == right.mean()


def test_parameters_count_the_coefficients_of_the_formula(dataset):
    features = len(set().union(*(counts(text) for text in dataset["train"]["text"])))
    results = bag_of_words_baselines(dataset)
    assert [result["parameters"] for result in results] == [2 * features + 2, 2 * features + 1]


def test_parameters_of_five_classes_are_five_rows_of_coefficients():
    rows = split([(f"word{label} the {n}", label) for label in range(5) for n in range(4)])
    features = len(set().union(*(counts(text) for text in rows["text"])))
    results = bag_of_words_baselines(DatasetDict(train=rows, validation=rows, test=rows))
    assert [result["parameters"] for result in results] == [5 * features + 5, 6 * features + 5]
    assert [result["mcc_test"] for result in results] == [1, 1]


def test_each_result_has_the_agreed_keys(dataset):
    for result in bag_of_words_baselines(dataset):
        assert list(result) == ["method", "accuracy_validation", "accuracy_test", "mcc_test", "seconds", "parameters"]


def test_seconds_are_measured(dataset):
    assert all(result["seconds"] > 0 for result in bag_of_words_baselines(dataset))


def test_labels_outside_train_change_no_prediction(dataset):
    flipped = dataset["test"].map(lambda row: {"label": 1 - row["label"]})
    other = bag_of_words_baselines(DatasetDict(train=dataset["train"], validation=dataset["validation"], test=flipped))
    for result, mirrored in zip(bag_of_words_baselines(dataset), other, strict=True):
        assert result["accuracy_test"] == 1 - mirrored["accuracy_test"]


def test_missing_split_is_named(dataset):
    with pytest.raises(ValueError, match="must have the splits train and test, found no test"):
        bag_of_words_baselines(DatasetDict(train=dataset["train"]))


def test_without_a_validation_split_the_rest_is_the_same(dataset):
    without = bag_of_words_baselines(DatasetDict(train=dataset["train"], test=dataset["test"]))
    for row, whole in zip(without, bag_of_words_baselines(dataset), strict=True):
        assert row["accuracy_validation"] is None
        same = row.keys() - {"accuracy_validation", "seconds"}
        assert {key: row[key] for key in same} == {key: whole[key] for key in same}


@real_data
def test_real_subj_accuracies():
    results = bag_of_words_baselines(load_task("subj", SHARED))
    assert [round(result["accuracy_test"], 3) for result in results] == pytest.approx([0.923, 0.901], abs=0.003)


def test_more_text_gives_a_second_row_a_method_fitted_on_both(dataset):
    more = {"film": split([("cold fine night", 1), ("a murder in rome", 0)])}
    rows = bag_of_words_baselines(dataset, more)
    assert [row["method"] for row in rows[2:]] == [f"{row['method']}, film too" for row in rows[:2]]
    both = DatasetDict(dataset | {"train": split([("cold fine night", 1), ("a murder in rome", 0), *TRAIN])})
    expected = bag_of_words_baselines(both)
    keys = ("accuracy_validation", "accuracy_test", "parameters")
    assert [[row[key] for key in keys] for row in rows[2:]] == [[row[key] for key in keys] for row in expected]
