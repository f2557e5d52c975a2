"""Bag-of-words baselines, fitted on the train split: what a classifier reaches without reading word order.

Naive Bayes: score(c) = log P(c) + sum_i n_i log P(i | c), P(i | c) = (N_ci + 1) / (sum_j N_cj + V), n_i the count of
word or bigram i in the text. Logistic regression: score = b + sum_i w_i x_i, x = tf-idf of the same counts, |x|_2 = 1.
Source: Wang and Manning 2012, Baselines and Bigrams (bigram naive Bayes); scikit-learn for both.
"""

from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset, DatasetDict
    from sklearn.pipeline import Pipeline

WORDS = {"ngram_range": (1, 2), "token_pattern": r"\S+", "lowercase": True}  # the text is tokenised already


def bag_of_words_baselines(dataset: "DatasetDict", more: "Mapping[str, Dataset] | None" = None) -> list[dict]:
    """One dict a method: method, accuracy_validation, accuracy_test (fractions of 1), mcc_test (Matthews' correlation),
    seconds, parameters.

    `dataset` has splits train, test and, or else accuracy_validation is None, validation, with columns text and label.
    `seconds` is the wall-clock time of fitting and predicting, `parameters` the number of fitted coefficients that
    prediction uses. The test split is predicted once, with nothing chosen on it. Of each text in `more`, by name, there
    is a second row a method, fitted on it and on the train split. Raises ValueError for a missing split.
    """
    missing = [name for name in ("train", "test") if name not in dataset]
    if missing:
        raise ValueError(f"dataset must have the splits train and test, found no {' and no '.join(missing)}")
    methods = {"naive Bayes, bigrams": _naive_bayes, "TF-IDF logistic regression, bigrams": _logistic_regression}
    own, found = _rows(dataset["train"]), []
    for name, text in [("", None), *(more or {}).items()]:
        train = own if text is None else [first + then for first, then in zip(_rows(text), own)]
        named = f", {name} too" * bool(name)
        found += [_evaluate(method + named, make(), train, dataset) for method, make in methods.items()]
    return found


def _naive_bayes() -> "Pipeline":
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    return make_pipeline(CountVectorizer(**WORDS), MultinomialNB(alpha=1.0))


def _logistic_regression() -> "Pipeline":
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(TfidfVectorizer(**WORDS), LogisticRegression(max_iter=1000))


def _rows(rows: "Dataset") -> list[list]:
    return [list(rows["text"]), list(rows["label"])]


def _evaluate(method: str, pipeline: "Pipeline", train: list[list], dataset: "DatasetDict") -> dict:
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    start = perf_counter()
    pipeline.fit(*train)
    judged = {name: _rows(dataset[name]) for name in ("validation", "test") if name in dataset}
    predicted = {name: (labels, pipeline.predict(text)) for name, (text, labels) in judged.items()}
    return {
        "method": method,
        "accuracy_validation": None,
        **{f"accuracy_{name}": float(accuracy_score(*pair)) for name, pair in predicted.items()},
        "mcc_test": float(matthews_corrcoef(*predicted["test"])),
        "seconds": perf_counter() - start,
        "parameters": _parameters(pipeline),
    }


def _parameters(pipeline: "Pipeline") -> int:
    """V features, C classes: naive Bayes C (V + 1) (log P(i | c), log P(c)); logistic regression V + C (V + 1) (idf;
    weights, bias), with two classes 2 V + 1."""
    vectorizer, classifier = pipeline[0], pipeline[-1]
    if hasattr(classifier, "feature_log_prob_"):
        return classifier.feature_log_prob_.size + classifier.class_log_prior_.size
    return vectorizer.idf_.size + classifier.coef_.size + classifier.intercept_.size
