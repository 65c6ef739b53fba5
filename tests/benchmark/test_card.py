from __future__ import annotations

import json

import jsonschema
import pytest

from backdoorlab.benchmark import Card, Runner
from backdoorlab.benchmark.card import METRICS, SCHEMA_FILE, complete, schema
from backdoorlab.core.errors import ArtifactError
from backdoorlab.metrics.result import Metrics


def test_published_schema_is_that_of_the_code():
    assert json.loads(SCHEMA_FILE.read_text()) == schema(), "regenerate card.schema.json from card.schema()"


def test_real_cards_fulfil_the_published_schema(filled: Runner):
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
    cards = [json.loads((run.path / "card.json").read_text()) for run in filled.store.runs()]
    assert len(cards) >= 4  # other tests add to the shared store
    for card in cards:
        validator.validate(card)
        assert set(METRICS) <= set(card["metrics"])
        assert -1 not in card["metrics"].values()
    del cards[0]["seconds"]
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(cards[0])


def test_a_card_states_cost_place_and_how_to_repeat_it(filled: Runner):
    attack, defense = filled.store.runs("attack")[0].card(), filled.store.runs("defense")[0].card()
    assert set(attack.seconds) == {"attack", "measure"}
    assert {"load", "defense", "measure"} == set(defense.seconds)
    assert 50 < attack.peak_memory_mb < 50_000
    assert attack.hardware["cores"] >= 1
    assert attack.hardware["precision"] in ("bf16", "fp32")
    assert {"instructions", "onednn_max_isa"} <= set(attack.hardware)
    assert "torch" in attack.versions
    assert "--train-size 400" in attack.command and "--recipe-set epochs=1" in attack.command
    assert defense.command.startswith(f"backdoorlab defend ft --run {defense.parents[0].split('/')[1]}")
    assert "--set epochs=4" in defense.command
    assert Card.from_json(attack.to_json()) == attack
    assert attack.experiment().to_json() == {k: v for k, v in attack.spec.items() if k != "resolved"} | {
        "attack": {k: v for k, v in attack.spec["attack"].items() if k != "code"}
    }


def _change(card: Card, **changes: object) -> str:
    return json.dumps(json.loads(card.to_json()) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"schema_version": 3}, "schema_version"),
        ({"status": "failed"}, "reason"),
        ({"metrics": {}}, "metrics lack acc"),
        ({"null_reasons": {}}, "null_reasons"),
        ({"key": "../../etc"}, "key"),
    ],
)
def test_invalid_cards_are_refused_in_one_line(filled: Runner, changes: dict[str, object], message: str):
    card = filled.store.runs("attack")[0].card()
    with pytest.raises(ArtifactError, match=message) as caught:
        Card.from_json(_change(card, **changes), "some/card.json")
    assert str(caught.value).startswith("some/card.json: ")
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_become_null_with_a_reason():
    values = {"acc": 0.5, "score": float("nan"), "per_class": [1.0, float("inf")]}
    metrics = complete(Metrics(values, {"score": "why", "acc": "not needed"}), "?")
    assert metrics["score"] is None
    assert metrics["per_class"] == [1.0, None]
    assert metrics.reasons["score"] == "why"
    assert metrics.reasons["per_class"] == "?"
    assert "acc" not in metrics.reasons
