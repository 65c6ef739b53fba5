"""Every wrong input gives exit code 2, one message with a hint on standard error, and no traceback."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BAD = ("attack", "badnets")
RUN, STORE, OUT = ("--run", "{attack}"), ("--store", "{store}"), ("--out", "o")
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    # commands and options
    "unknown command": (("atack",), "attack"),
    "unknown option": ((*BAD, "--poisson-rate", "0.1"), "--poison-rate"),
    "option without value": ((*BAD, "--seed"), "--seed"),
    "seed not a number": ((*BAD, "--seed", "one"), "--seed"),
    "negative seed": ((*BAD, "--seed", "-1"), "--seed"),
    "kind of list": (("list", "attack"), "attacks"),
    "list without kind": (("list",), "attacks|defenses|datasets|models"),
    "list as two things": (("list", "attacks", "--json", "--markdown"), "--json and --markdown exclude each other"),
    "list modality": (("list", "attacks", "--modality", "images"), "Did you mean 'image'?"),
    # attack
    "attack without name": (("attack",), "backdoorlab list attacks"),
    "unknown attack": (("attack", "badnet"), "Did you mean 'badnets'?"),
    "help of an unknown attack": (("attack", "badnet", "--help"), "Did you mean 'badnets'?"),
    "unknown dataset": ((*BAD, "--dataset", "cifar"), "cifar10"),
    "unknown model": ((*BAD, "--model", "resnet_18"), "Did you mean 'resnet18'?"),
    "unknown recipe": ((*BAD, "--recipe", "fats"), "Did you mean 'fast'?"),
    "unknown device": ((*BAD, "--device", "gpu"), "auto, cpu, cuda"),
    "unknown cuda device": ((*BAD, "--device", "cuda:99"), "--device cuda:99"),
    "malformed cuda device": ((*BAD, "--device", "cuda:x"), "unknown device"),
    "unknown kind of task": ((*BAD, "--kind", "diffuse"), "Did you mean 'diffusion'?"),
    "poison rate 0": ((*BAD, "--poison-rate", "0"), "must be > 0 and <= 1"),
    "poison rate 1.5": ((*BAD, "--poison-rate", "1.5"), "must be > 0 and <= 1"),
    "poison rate -1": ((*BAD, "--poison-rate", "-1"), "must be > 0 and <= 1"),
    "poison rate nan": ((*BAD, "--poison-rate", "nan"), "must be > 0 and <= 1"),
    "poison rate inf": ((*BAD, "--poison-rate", "inf"), "must be > 0 and <= 1"),
    "poison rate not a number": ((*BAD, "--poison-rate", "ten"), "--poison-rate"),
    "poison rate that poisons none": ((*BAD, "--poison-rate", "0.0001"), "smallest useful rate"),
    "target outside the classes": ((*BAD, "--target", "99"), "which has 10"),
    "negative target": ((*BAD, "--target", "-1"), "must be >= 0"),
    "set without equals": ((*BAD, "--set", "size"), "KEY=VALUE"),
    "set without key": ((*BAD, "--set", "=5"), "KEY=VALUE"),
    "set unknown key": ((*BAD, "--set", "sise=5"), "Did you mean 'size'?"),
    "set wrong type": ((*BAD, "--set", "size=big"), "must be of type int"),
    "set half a pixel": ((*BAD, "--set", "size=2.5"), "must be of type int"),
    "set out of range": ((*BAD, "--set", "color=256"), "must be >= 0 and <= 255"),
    "set wrong choice": ((*BAD, "--set", "position=botom-right"), "Did you mean 'bottom-right'?"),
    "set twice": ((*BAD, "--set", "size=2", "--set", "size=3"), "given twice"),
    "target twice": ((*BAD, "--target", "1", "--set", "target=2"), "given twice"),
    "patch larger than the image": ((*BAD, "--set", "size=17"), "may be at most 16"),
    "benign with a rate": (("attack", "none", "--poison-rate", "0.1"), "poison_rate"),
    "recipe set without equals": ((*BAD, "--recipe-set", "epochs"), "--recipe-set: expected KEY=VALUE"),
    "recipe set unknown field": ((*BAD, "--recipe-set", "epoch=3"), "Did you mean 'epochs'?"),
    "recipe set wrong type": ((*BAD, "--recipe-set", "epochs=many"), "must be of type int"),
    "recipe set nan": ((*BAD, "--recipe-set", "lr=nan"), "lr must be a finite number"),
    "recipe set out of range": ((*BAD, "--recipe-set", "warmup=7"), "warmup must be at most 1"),
    "recipe set no truth value": ((*BAD, "--recipe-set", "augment=7"), "augment must be true or false"),
    "recipe set of a classifier for diffusion": (("attack", "baddiffusion", "--recipe-set", "epochs=3"), "'steps'"),
    "recipe set wrong optimiser": ((*BAD, "--recipe-set", "optimizer=adam"), "Did you mean 'adamw'?"),
    "set an empty path": ((*BAD, "--set", "patch="), "patch: expected a file or folder, got nothing"),
    "set a path of no user": ((*BAD, "--set", "patch=~nouser/x"), "there is no user 'nouser'"),
    "set a long path": ((*BAD, "--set", "patch={long}"), "too long"),
    "asset of no user": (("attack", "lf", "--asset", "clean-surrogate=~nouser/x"), "there is no user 'nouser'"),
    "asset with a long path": (("attack", "lf", "--asset", "clean-surrogate={long}"), "too long"),
    "asset without a file": (("attack", "lf", "--asset", "clean-surrogate="), "no such file"),
    "train size 0": ((*BAD, "--train-size", "0"), "train_size must be at least 1"),
    "train size too large": ((*BAD, "--train-size", "99999"), "1437 samples, 99999 were asked for"),
    "test size too large": ((*BAD, "--test-size", "5000"), "360 samples, 5000 were asked for"),
    "size too small": ((*BAD, "--size", "2"), "size must be at least 8"),
    "root missing": ((*BAD, "--root", "no/such/folder"), "no such folder: no/such/folder"),
    "root of no user": ((*BAD, "--root", "~nouser/x"), "--root: ~nouser/x: there is no user 'nouser'"),
    "root with a long path": ((*BAD, "--root", "{long}"), "--root: a name in the path has more than 255 bytes"),
    "root below a file": ((*BAD, "--root", "{file}/x"), "no such folder"),
    "folder of no user": ((*BAD, "--dataset", "folder:~nouser/x"), "there is no user 'nouser'"),
    "folder with a long path": ((*BAD, "--dataset", "folder:{long}"), "too long"),
    "csv of no user": ((*BAD, "--dataset", "csv:~nouser/x"), "there is no user 'nouser'"),
    "csv with a long path": ((*BAD, "--dataset", "csv:{long}"), "too long"),
    "data not found": ((*BAD, "--dataset", "cifar10", "--root", "{empty}"), "--root or $BACKDOORLAB_DATA"),
    "folder missing": ((*BAD, "--dataset", "folder:no/such"), "no/such"),
    "folder empty": ((*BAD, "--dataset", "folder:{empty}"), "{empty}"),
    "folder with an empty class": ((*BAD, "--dataset", "folder:{hollow}"), "dogs"),
    "folder with a corrupt image": ((*BAD, "--dataset", "folder:{corrupt}"), "bad.png"),
    "csv missing": (("attack", "badnets", "--dataset", "csv:no.csv"), "no.csv"),
    "csv without columns": (("attack", "badnets", "--dataset", "csv:{table}"), "{table}"),
    "attack of another modality": (("attack", "sig", "--dataset", "csv:{texts}"), "text"),
    "store is a file": ((*BAD, "--store", "{file}"), "is a file; expected a folder"),
    "store cannot be made": ((*BAD, "--store", "{file}/runs"), "cannot use"),
    "store of no user": ((*BAD, "--store", "~nouser/x"), "--store: ~nouser/x: there is no user 'nouser'"),
    "store with a long path": ((*BAD, "--store", "{long}"), "--store: a name in the path"),
    # defend
    "defend without name": (("defend",), "backdoorlab list defenses"),
    "defend without run": (("defend", "ft"), "--run RUN"),
    "unknown defense": (("defend", "fft", *RUN), "Did you mean 'ft'?"),
    "no store": (("defend", "ft", "--run", "abc", "--store", "nowhere"), "no store at nowhere"),
    "unknown run": (("defend", "ft", "--run", "zzzz", *STORE), "no run 'zzzz'"),
    "defend unknown key": (("defend", "ft", *RUN, "--set", "epoch=3", *STORE), "'epochs'"),
    "defend out of range": (("defend", "ft", *RUN, "--set", "lr=0", *STORE), "must be > 0"),
    "defend fraction": (("defend", "ft", *RUN, "--clean-fraction", "2", *STORE), "<= 1"),
    "defend other seed": (("defend", "ft", *RUN, "--seed", "7", *STORE), "has seed 0"),
    "defend a run of no user": (("defend", "ft", "--run", "~nouser/x", *STORE), "there is no user 'nouser'"),
    "defend a run with a long path": (("defend", "ft", "--run", "{long}", *STORE), "no run"),
    # bench and results
    "grid of no user": (("bench", "~nouser/x.yaml"), "there is no user 'nouser'"),
    "grid with a long path": (("bench", "{long}"), "more than 255 bytes"),
    "grid is a folder": (("bench", "{empty}"), "no such grid file"),
    "results of no user": (("results", "--store", "~nouser/x"), "there is no user 'nouser'"),
    "empty metric": (("results", "--metric", "", *STORE), "unknown metric ''"),
    "grid missing": (("bench", "no.yaml"), "no such grid file: no.yaml"),
    "grid not yaml": (("bench", "{broken}", *STORE), "broken.yaml"),
    "grid with a typo": (("bench", "{typo}", *STORE), "attacks"),
    "grid with an unknown attack": (("bench", "{nobody}", *STORE), "badnets"),
    "unknown engine": (("bench", "{typo}", "--engine", "locale"), "Did you mean 'local'?"),
    "results without store": (("results", "--store", "nowhere"), "no store at nowhere"),
    "unknown metric": (("results", "--metric", "accuracy", *STORE), "acc"),
    "unknown group": (("results", "--group-by", "defence", *STORE), "Did you mean 'defense'?"),
    "empty group": (("results", "--group-by", ",", *STORE), "--group-by"),
    "json and csv": (("results", "--json", "--csv", *STORE), "exclude each other"),
    # show
    "show unknown run": (("show", "zzzz", *STORE), "no run 'zzzz'"),
    "show ambiguous run": (("show", "{ambiguous}", "--store", "{twins}"), "Give more digits"),
    "show tampered run": (("show", "{attack}", "--store", "{tampered}"), "changed after the run"),
    "figure of a strange type": (("show", "{attack}", "--figure", "a.doc", *STORE), ".png, .pdf, .svg"),
    "figure is a folder": (("show", "{attack}", "--figure", "{empty}", *STORE), "--figure: {empty} is a folder"),
    "figure exists": (("show", "{attack}", "--figure", "{digit}", *STORE), "exists; choose another name"),
    "figure below a file": (("show", "{attack}", "--figure", "{file}/a.png", *STORE), "is a file, not a folder"),
    "figure of no user": (("show", "{attack}", "--figure", "~nouser/a.png", *STORE), "there is no user 'nouser'"),
    "figure with a long path": (("show", "{attack}", "--figure", "{long}", *STORE), "--figure: a name in the path"),
    "figure without a name": (("show", "{attack}", "--figure", "", *STORE), "--figure: expected a path, got nothing"),
    "figure of a benign run": (("show", "{benign}", "--figure", "a.png", *STORE), "no trigger"),
    # export
    "export without run": (("export", *OUT), "RUN"),
    "export without out": (("export", "{attack}", *STORE), "--out DIR"),
    "export without store": (("export", "{attack}", *OUT, "--store", "nowhere"), "no store at nowhere"),
    "export unknown run": (("export", "zzzz", *OUT, *STORE), "no run 'zzzz'"),
    "export a benign run": (("export", "{benign}", *OUT, *STORE), "its training set is clean"),
    "export a repair": (("export", "{repair}", *OUT, *STORE), "export attack/{attack}, on which it stands"),
    "export tampered poison": (("export", "{attack}", *OUT, "--store", "{torn}"), "checksum"),
    "export unknown format": (("export", "{attack}", *OUT, "--format", "folders", *STORE), "Did you mean 'folder'?"),
    "export unknown choice": (("export", "{attack}", *OUT, "--only", "poison", *STORE), "Did you mean 'poisoned'?"),
    "export into a full folder": (("export", "{attack}", "--out", "{place}", *STORE), "is not empty"),
    "export over what is no export": (("export", "{attack}", "--out", "{place}", "--force", *STORE), "no SHA256SUMS"),
    "export into a file": (("export", "{attack}", "--out", "{file}", *STORE), "is a file"),
    "export below a file": (("export", "{attack}", "--out", "{file}/x", *STORE), "is a file, not a folder"),
    "export to no user": (("export", "{attack}", "--out", "~nouser/x", *STORE), "there is no user 'nouser'"),
    "export to a long path": (("export", "{attack}", "--out", "{long}", *STORE), "--out: a name in the path"),
    "export to nothing": (("export", "{attack}", "--out", "", *STORE), "--out: expected a path, got nothing"),
    "export here": (("export", "{attack}", "--out", ".", *STORE), "working directory"),
    "export with a missing root": (("export", "{attack}", *OUT, "--root", "no/such", *STORE), "no such folder"),
    # stamp and predict
    "stamp without run": (("stamp", "{digit}", "--out", "o"), "--run RUN"),
    "stamp without out": (("stamp", "{digit}", *RUN, *STORE), "--out DIR"),
    "stamp without inputs": (("stamp", *RUN, *STORE), "Missing argument 'IN'"),
    "stamp with a repair": (("stamp", "{digit}", "--run", "{repair}", "--out", "o", *STORE), "{attack}"),
    "stamp with a benign run": (("stamp", "{digit}", "--run", "{benign}", "--out", "o", *STORE), "trigger"),
    "stamp with tampered trigger": (("stamp", "{digit}", *RUN, "--out", "o", "--store", "{torn}"), "checksum"),
    "stamp missing file": (("stamp", "no.png", *RUN, "--out", "o", *STORE), "no such file"),
    "stamp corrupt file": (("stamp", "{badpng}", *RUN, "--out", "o", *STORE), "bad.png"),
    "stamp wrong size": (("stamp", "{large}", *RUN, "--out", "o", *STORE), "takes 16x16"),
    "stamp wrong type": (("stamp", "{file}", *RUN, "--out", "o", *STORE), ".png, .jpg"),
    "stamp sound on an image model": (("stamp", "{wav}", *RUN, "--out", "o", *STORE), ".png"),
    "stamp wrong array": (("stamp", "{floats}", *RUN, "--out", "o", *STORE), "expected uint8"),
    "stamp onto the input": (("stamp", "{digit}", *RUN, "--out", "{place}", *STORE), "never overwritten"),
    "stamp into a file": (("stamp", "{digit}", *RUN, "--out", "{file}", *STORE), "is a file"),
    "stamp below a file": (("stamp", "{digit}", *RUN, "--out", "{file}/x", *STORE), "is a file, not a folder"),
    "stamp to no user": (("stamp", "{digit}", *RUN, "--out", "~nouser/x", *STORE), "there is no user 'nouser'"),
    "stamp to a long path": (("stamp", "{digit}", *RUN, "--out", "{long}", *STORE), "--out: a name in the path"),
    "stamp from no user": (("stamp", "~nouser/x.png", *RUN, *OUT, *STORE), "there is no user 'nouser'"),
    "stamp from a long path": (("stamp", "{long}", *RUN, *OUT, *STORE), "too long"),
    "stamp over a file": (("stamp", "{digit}", *RUN, "--out", "{taken}", *STORE), "exists; choose another folder"),
    "stamp empty folder": (("stamp", "{empty}", *RUN, "--out", "o", *STORE), "no image samples"),
    "predict missing file": (("predict", "no.png", *RUN, *STORE), "no such file"),
    "predict wrong size": (("predict", "{large}", "--run", "{repair}", *STORE), "--resize"),
    "predict from no user": (("predict", "~nouser/x.png", *RUN, *STORE), "there is no user 'nouser'"),
    "predict from a long path": (("predict", "{long}", *RUN, *STORE), "too long"),
    # quickstart
    "quickstart below a file": (("quickstart", "--out", "{file}/x"), "--out: cannot use"),
    "quickstart onto a folder": (("quickstart", "--out", "{figure}"), "quickstart.png is a folder"),
    "quickstart to no user": (("quickstart", "--out", "~nouser/x"), "there is no user 'nouser'"),
    "quickstart to a long path": (("quickstart", "--out", "{long}"), "--out: a name in the path"),
    "quickstart unknown defense": (("quickstart", "--defenses", "ftt"), "Did you mean 'ft'?"),
    "quickstart into a file": (("quickstart", "--out", "{file}"), "is a file"),
}


@pytest.fixture(scope="module")
def places(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files and folders that the cases name."""
    root = tmp_path_factory.mktemp("wrong")
    for name in (
        "empty",
        "hollow/dogs",
        "hollow/cats",
        "corrupt/a",
        "corrupt/b",
        "place",
        "taken",
        "figure/quickstart.png",
    ):
        (root / name).mkdir(parents=True)
    grey = Image.fromarray(np.zeros((16, 16), np.uint8))
    for name in ("hollow/cats/1.png", "corrupt/a/1.png", "corrupt/b/1.png", "place/digit.png", "taken/digit.png"):
        grey.save(root / name)
    (root / "corrupt/a/bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    grey.resize((20, 24)).save(root / "large.png")
    (root / "file.xyz").write_text("x")
    (root / "table.csv").write_text("a,b\n1,2\n")
    (root / "texts.csv").write_text("text,label\n" + "good film,1\nbad film,0\n" * 20)
    (root / "broken.yaml").write_text("name: [unclosed\n")
    (root / "typo.yaml").write_text("name: t\ntasks: [{dataset: digits}]\natacks: [badnets]\n")
    (root / "nobody.yaml").write_text(
        "name: t\ntasks: [{dataset: digits}]\nattacks: [badnetz]\ndefenses: [ft]\nseeds: [0]\n"
    )
    np.save(root / "floats.npy", np.zeros((1, 16, 16)))
    with wave.open(str(root / "click.wav"), "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(2)
        sound.setframerate(44100)
        sound.writeframes(b"\0" * 400)
    tampered, torn, twins = root / "tampered", root / "torn", root / "twins"
    for copy in (tampered, torn):
        shutil.copytree(lab.store, copy)
    card = tampered / "attack" / lab.attack / "card.json"
    record = json.loads(card.read_text())
    record["metrics"]["asr"] = 0.5
    card.write_text(json.dumps(record))
    trigger = torn / "attack" / lab.attack / "trigger.safetensors"
    trigger.write_bytes(trigger.read_bytes()[:-1] + b"\x07")
    for digit in "01":
        (twins / "attack" / f"abc{digit}{'0' * 16}").mkdir(parents=True)
    return {
        "store": str(lab.store),
        "attack": lab.attack,
        "benign": lab.benign,
        "repair": lab.repair,
        "empty": str(root / "empty"),
        "hollow": str(root / "hollow"),
        "corrupt": str(root / "corrupt"),
        "file": str(root / "file.xyz"),
        "table": str(root / "table.csv"),
        "texts": str(root / "texts.csv"),
        "broken": str(root / "broken.yaml"),
        "typo": str(root / "typo.yaml"),
        "nobody": str(root / "nobody.yaml"),
        "digit": str(root / "place/digit.png"),
        "place": str(root / "place"),
        "large": str(root / "large.png"),
        "badpng": str(root / "corrupt/a/bad.png"),
        "floats": str(root / "floats.npy"),
        "wav": str(root / "click.wav"),
        "tampered": str(tampered),
        "torn": str(torn),
        "twins": str(twins),
        "ambiguous": "abc",
        "long": "x" * 300 + ".png",
        "taken": str(root / "taken"),
        "figure": str(root / "figure"),
    }


@pytest.mark.parametrize("case", CASES)
def test_wrong_input(
    case: str, cli: Callable[..., Any], places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKDOORLAB_STORE", str(tmp_path / "runs"))
    monkeypatch.delenv("BACKDOORLAB_DATA", raising=False)
    argv, hint = CASES[case]
    reply = cli(*(word.format(**places) for word in argv))
    assert reply.code == 2, f"{reply.code}: {reply.out}{reply.err}"
    assert hint.format(**places) in " ".join(reply.err.split()), reply.err
    assert "Traceback" not in reply.err
    assert reply.err.count("error:") + reply.err.count("─ Error ─") == 1
    assert not list((tmp_path / "runs").glob("attack/*")), "a refused command must not leave a run behind"
    assert not (tmp_path / "o").exists()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40
