"""The tasks on their real files: items, prompts, verdicts, scores, baselines."""

import json
import shutil
from pathlib import Path

import pytest

from bioinstruct.eval.baselines import lexicon_outputs, majority_outputs
from bioinstruct.eval.task import Item, Task
from bioinstruct.eval.tasks import TASKS, find_task
from bioinstruct.eval.tasks.pubmedqa import split
from bioinstruct.synth import convert
from bioinstruct.synth.sources import read_conll

DEMO = Path(__file__).parents[2] / "train" / "demo"
NCBI, NCBI_TRAIN = DEMO / "ncbi-disease-test.tsv.gz", DEMO / "ncbi-disease-train.tsv.gz"
PUBMEDQA = DEMO / "pubmedqa-ori_pqal.json.gz"
FILES = {"ncbi-disease": NCBI, "pubmedqa": PUBMEDQA}
FORMS = [("ncbi-disease", "list"), ("ncbi-disease", "medtuned"), ("pubmedqa", None)]


@pytest.fixture(scope="module")
def items() -> dict[str, list[Item]]:
    made = {form: find_task("ncbi-disease").items(NCBI, form) for form in convert.NER_FORMS}
    return {**made, "": find_task("pubmedqa").items(PUBMEDQA)}


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_gold_answers_score_all_but_what_the_form_leaves_open(
    items: dict[str, list[Item]], name: str, form: str | None
) -> None:
    task, its = find_task(name), items[form or ""]
    scores = task.score(its, [item.gold for item in its])
    expected = 959 / 960 if form == "list" else 1.0
    assert scores[task.main].value == pytest.approx(expected, abs=1e-12)
    assert {score.unparsed for score in scores.values()} == {0}
    assert {score.n for score in scores.values()} == {500 if name == "pubmedqa" else 940}
    assert next(iter(scores)) == task.main


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_empty_answers_score_0_and_are_all_counted(
    items: dict[str, list[Item]], name: str, form: str | None
) -> None:
    its = items[form or ""]
    for score in find_task(name).score(its, [""] * len(its)).values():
        assert (score.value, score.low, score.high) == (0, 0, 0)
        assert score.unparsed == score.n == len(its)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_draw_is_a_seeded_part_in_file_order(name: str, form: str | None) -> None:
    task = find_task(name)
    every = [item.id for item in task.items(FILES[name], form)]
    drawn = [item.id for item in task.items(FILES[name], form, limit=50, seed=1)]
    assert len(set(drawn)) == 50
    assert drawn == [key for key in every if key in set(drawn)]
    assert drawn == [item.id for item in task.items(FILES[name], form, limit=50, seed=1)]
    assert drawn != [item.id for item in task.items(FILES[name], form, limit=50, seed=2)]
    assert every == [item.id for item in task.items(FILES[name], form, limit=9999)]
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        task.items(FILES[name], form, limit=0)


def test_prompts_are_those_of_the_training_records() -> None:
    (sentence, *_) = read_conll(NCBI)
    item = find_task("ncbi-disease").items(NCBI)[0]
    record = convert.ner_record(sentence, "disease", "list")
    assert (item.instruction, item.input) == (record["instruction"], record["input"])
    assert (item.id, item.gold) == ("1", record["output"])
    question = split(PUBMEDQA).test[0]
    item = find_task("pubmedqa").items(PUBMEDQA)[0]
    record = convert.qa_record(question)
    assert (item.instruction, item.input) == (record["instruction"], record["input"])
    assert (item.id, item.gold) == (question.id, question.answer)


def _ner(tmp_path: Path, output: str, form: str = "list") -> dict[str, int]:
    path = tmp_path / "t.tsv"
    path.write_text("breast\tB-Disease\ncancer\tI-Disease\nor\tO\ncancer\tB-Disease\n")
    (item,) = find_task("ncbi-disease").items(path, form)
    return item.judge(output).counts


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        ("breast cancer\ncancer", (2, 0, 0, 0)),
        ("breast cancer", (1, 0, 1, 0)),
        ("cancer", (0, 1, 2, 0)),
        ("breast cancer\nlung cancer", (1, 1, 1, 1)),
        ("none", (0, 0, 2, 0)),
        ("", (0, 0, 2, 0)),
        ("breast cancer\nnone", (0, 0, 2, 0)),
        ("breast cancer\ncancer\ncancer\nbreast", (2, 2, 0, 2)),
    ],
)
def test_list_counts(tmp_path: Path, output: str, counts: tuple[int, ...]) -> None:
    names = ("tp", "fp", "fn", "hallucinated")
    assert _ner(tmp_path, output) == dict(zip(names, counts, strict=True))


def test_medtuned_counts(tmp_path: Path) -> None:
    output = "breast : B\ncancer : I\nor : O\nof : B\nlung"
    assert _ner(tmp_path, output, "medtuned") == {
        "tp": 1, "fp": 1, "fn": 1, "hallucinated": 1, "bad_lines": 1,
    }  # fmt: skip


def test_every_gold_mention_is_hit_or_missed(items: dict[str, list[Item]]) -> None:
    task = find_task("ncbi-disease")
    outputs = [items["list"][i - 1].gold for i in range(940)]  # each sentence's neighbour's answer
    extra = task.score(items["list"], outputs)["f1"].extra
    assert extra["tp"] + extra["fn"] == 960
    assert extra["hallucinated"] <= extra["fp"]


@pytest.mark.parametrize("form", convert.NER_FORMS)
@pytest.mark.parametrize(
    ("fold_case", "counts"), [(True, (596, 467, 364)), (False, (589, 158, 371))]
)
def test_lexicon_baseline(
    items: dict[str, list[Item]], form: str, fold_case: bool, counts: tuple[int, int, int]
) -> None:
    outputs = lexicon_outputs(read_conll(NCBI_TRAIN), items[form], form=form, fold_case=fold_case)
    score = find_task("ncbi-disease").score(items[form], outputs)["f1"]
    assert tuple(score.extra[name] for name in ("tp", "fp", "fn")) == counts
    assert score.value == pytest.approx(0.589 if fold_case else 0.690, abs=5e-4)
    assert score.unparsed == score.extra["hallucinated"] == 0


def test_lexicon_takes_the_longest_match() -> None:
    train = [s for s in read_conll(NCBI_TRAIN) if "breast cancer" in s.text()][:50]
    judge = find_task("ncbi-disease").items(NCBI)[0].judge
    item = Item("1", "", "Breast Cancer and cancer", "", judge)
    assert lexicon_outputs(train, [item]) == ["Breast Cancer\ncancer"]
    assert lexicon_outputs([], [item]) == ["none"]


def test_majority_baseline(items: dict[str, list[Item]]) -> None:
    outputs = majority_outputs(split(PUBMEDQA).train, items[""])
    assert set(outputs) == {"yes"}
    assert find_task("pubmedqa").score(items[""], outputs)["accuracy"].value == 0.552


def test_pubmedqa_needs_its_labels_beside_it(tmp_path: Path) -> None:
    for name in ("ori_pqal.json.gz", "my-ori_pqal.json.gz", "other.json.gz"):
        shutil.copy(PUBMEDQA, tmp_path / name)
    task = find_task("pubmedqa")
    with pytest.raises(ValueError, match="needs test_ground_truth.json beside it"):
        task.items(tmp_path / "ori_pqal.json.gz")
    shutil.copy(DEMO / "pubmedqa-test_ground_truth.json", tmp_path / "test_ground_truth.json")
    assert len(task.items(tmp_path / "ori_pqal.json.gz")) == 500
    assert len(task.items(tmp_path / "other.json.gz")) == 500
    with pytest.raises(ValueError, match="needs my-test_ground_truth.json beside it"):
        task.items(tmp_path / "my-ori_pqal.json.gz")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"1": "yes"}, "names id 1, which .* does not hold"),
        ({"12377809": "no"}, "answer id 12377809 differently"),
    ],
)
def test_pubmedqa_labels_must_fit(tmp_path: Path, labels: dict[str, str], message: str) -> None:
    shutil.copy(PUBMEDQA, tmp_path / "ori_pqal.json.gz")
    (tmp_path / "test_ground_truth.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match=message):
        find_task("pubmedqa").items(tmp_path / "ori_pqal.json.gz")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_form_must_be_known(task: Task) -> None:
    with pytest.raises(ValueError, match=f"task {task.name}: --form must be .*, not 'xml'"):
        task.items(FILES[task.name], "xml")


def test_task_names() -> None:
    with pytest.raises(
        ValueError, match="no task is called 'ncbi-disese', only .*mean ncbi-disease"
    ):
        find_task("ncbi-disese")
    with pytest.raises(ValueError, match="no task is called 'xyz', only ncbi-disease, pubmedqa$"):
        find_task("xyz")
    assert all(name == task.name and task.paper and task.licence for name, task in TASKS.items())


def test_a_corpus_of_another_entity_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("a\tB-Gene\n")
    with pytest.raises(ValueError, match="t.tsv tags no 'disease', only Gene"):
        find_task("ncbi-disease").items(path)
