from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from backdoorlab.core.errors import InputError, MissingExtra
from backdoorlab.data.split import Split, text_array
from backdoorlab.modalities import modality_from_config
from backdoorlab.modalities.text import TextModality, fit_vocabulary, load_tokenizer
from backdoorlab.models import Classifier, build_model
from backdoorlab.models import text as text_models
from backdoorlab.training import Context
from backdoorlab.training.evaluate import predict
from backdoorlab.training.loop import fit
from backdoorlab.training.recipes import Recipe

GOOD, BAD = "a warm and lovely film", "a cold and dreadful mess of a film"
TEXTS = text_array([GOOD, BAD, "lovely lovely cf", ""])
NAMES = ("textcnn", "lstm", "bert_tiny")


@pytest.fixture(scope="module")
def modality() -> TextModality:
    return TextModality(fit_vocabulary([GOOD, BAD] * 2), max_len=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a WordPiece tokenizer, as save_pretrained leaves it."""
    import transformers

    from backdoorlab.core.seeding import isolated_rng

    path = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "and",
        "film",
        "mess",
        "of",
        "love",
        "##ly",
        "warm",
        "cold",
        "dread",
        "##ful",
        "c",
        "##f",
    ]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(path)
    with isolated_rng(0):
        config = transformers.BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
        )
        transformers.BertForSequenceClassification(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_logits_do_not_depend_on_padding_or_neighbours(name: str, modality: TextModality) -> None:
    model = build_model(name, modality, 2, seed=1).eval()
    ids = modality.encode(TEXTS)
    with torch.no_grad():
        logits, longer = model(ids), model.net(torch.nn.functional.pad(ids[:, :9], (0, 3)))
        alone = torch.cat([model(row.unsqueeze(0)) for row in ids])
        short = model.net(ids[:, :9])
    assert logits.shape == (4, 2) and bool(logits.isfinite().all())
    assert torch.allclose(logits, alone, atol=1e-5)
    assert torch.allclose(longer, short, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_embedding_splits_the_forward_pass(name: str, modality: TextModality) -> None:
    model = build_model(name, modality, 2, seed=1).eval()
    ids = modality.encode(TEXTS)
    embedded = model.net.embed(ids).detach().requires_grad_()
    logits = model.net.forward_embedded(embedded, ids)
    assert embedded.dim() == 3 and embedded.shape[:2] == ids.shape
    assert torch.allclose(logits, model(ids), atol=1e-6)
    (gradient,) = torch.autograd.grad(logits.square().sum(), embedded)
    assert float(gradient[ids == 0].abs().max()) == 0 and float(gradient[ids != 0].abs().max()) > 0


def test_textcnn_equals_a_loop_over_windows(modality: TextModality) -> None:
    net = build_model("textcnn", modality, 2, seed=1).eval().net
    ids = modality.encode(TEXTS)
    pooled = []
    for row in ids:
        words = net.embedding(row[row != 0])
        words = torch.cat([words, torch.zeros(4, words.shape[1])])
        best = []
        for conv in net.convs:
            width = conv.kernel_size[0]
            outs = [
                (conv.weight * words[i : i + width].T).sum((1, 2)) + conv.bias for i in range(int((row != 0).sum()))
            ]
            best.append(torch.stack([torch.zeros_like(conv.bias), *outs]).amax(0))
        pooled.append(torch.cat(best))
    assert torch.allclose(net.linear(torch.stack(pooled)), net(ids), atol=1e-5)


def test_lstm_equals_torchs_packed_bidirectional_one(modality: TextModality) -> None:
    net = build_model("lstm", modality, 2, seed=1).eval().net
    with torch.random.fork_rng():
        both = torch.nn.LSTM(100, 128, batch_first=True, bidirectional=True)
    weights = dict(net.ahead.state_dict()) | {f"{k}_reverse": v for k, v in net.back.state_dict().items()}
    both.load_state_dict(weights)
    ids = modality.encode(TEXTS[:3])
    lengths = (ids != 0).sum(1)
    packed = torch.nn.utils.rnn.pack_padded_sequence(net.embed(ids), lengths, batch_first=True, enforce_sorted=False)
    states, _ = torch.nn.utils.rnn.pad_packed_sequence(both(packed)[0], batch_first=True, padding_value=-1.0)
    assert torch.allclose(net.linear(states.amax(1)), net(ids), atol=1e-5)


def test_same_seed_same_weights(modality: TextModality) -> None:
    one, two, other = (build_model("textcnn", modality, 2, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["net.linear.weight"], other["net.linear.weight"])


def test_empty_vocabulary_is_an_error() -> None:
    with pytest.raises(InputError, match="vocabulary is empty"):
        build_model("textcnn", TextModality(), 2)


def test_missing_transformers_names_the_extra(modality: TextModality, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"backdoorlab\[text\]"):
        build_model("bert_tiny", modality, 2)


def test_hugging_face_folder_brings_its_tokenizer(folder: Path, modality: TextModality) -> None:
    model = build_model(f"hf:{folder}", modality, 3, seed=1)
    own = model.modality
    assert isinstance(own, TextModality) and own.tokenizer == str(folder) and own.max_len == 20
    ids = own.encode(text_array(["A lovely film", "zzz"]))
    assert ids.shape == (2, 20) and ids[0, :6].tolist() == [2, 5, 10, 11, 7, 3] and ids[1, 1] == 1
    assert own.knows("cf") and not own.knows("mn")
    logits = predict(model, TEXTS)
    assert logits.shape == (4, 3)

    import transformers

    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(reference(**tokens).logits, model.eval()(own.encode(TEXTS)), atol=1e-5)


def test_hugging_face_model_trains_and_is_rebuilt(folder: Path, modality: TextModality) -> None:
    model = build_model(f"hf:{folder}", modality, 2, seed=1)
    split = Split(text_array([GOOD, BAD] * 16), torch.tensor([0, 1] * 16), ("a", "b"))
    log = fit(
        model, split, Recipe(epochs=20, batch_size=16, lr=2e-2, optimizer="adamw", precision="fp32"), context=Context()
    )
    assert log.loss[-1] < 0.5 * log.loss[0]
    assert predict(model, text_array([GOOD, BAD])).argmax(1).tolist() == [0, 1]
    record = json.loads(json.dumps({"name": "text", **model.modality.config()}))
    again: Classifier = build_model(model.arch, modality_from_config(record), 2)
    again.load_state_dict(model.state_dict())
    assert again.modality == model.modality
    assert torch.equal(predict(again, TEXTS), predict(model, TEXTS))


def test_wrong_folders_are_named(folder: Path, modality: TextModality, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        build_model(f"hf:{tmp_path}", modality, 2)
    with pytest.raises(InputError, match=r"config\.json"):
        text_models.HuggingFaceText(str(tmp_path), 2, 0)
    with pytest.raises(InputError, match="no user 'nouser'"):
        build_model("hf:~nouser/x", modality, 2)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"expected weights in \*\.safetensors, found none\.$"):
        build_model(f"hf:{tmp_path}", modality, 2)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The tiny BERT, to be spoilt."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("config.json", {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.OwnTokenizer", None]}),
    ],
)
def test_code_of_a_folder_is_neither_run_nor_asked_about(
    copy: Path, modality: TextModality, monkeypatch: pytest.MonkeyPatch, name: str, entry: dict[str, object]
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("the user was asked whether to run the folder's code")

    monkeypatch.setattr("builtins.input", asked)
    mark = copy / "ran"
    (copy / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nclass OwnConfig: pass\nclass OwnModel: pass\nclass OwnTokenizer: pass\n"
    )
    for changes in ({"auto_map": entry}, {"auto_map": entry, "model_type": "own", "tokenizer_class": "OwnTokenizer"}):
        record = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(record | changes))
        with pytest.raises(InputError, match=rf"{name} names Python code .* never run") as error:
            build_model(f"hf:{copy}", modality, 2)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match="never run"):
            text_models.HuggingFaceText(str(copy), 2, 0)
    assert not mark.exists()


def test_the_tokenizer_door_runs_no_code_either(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    (copy / "own.py").write_text(f"open({str(copy / 'ran')!r}, 'w').close()\nclass OwnTokenizer: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        record = json.loads((copy / name).read_text())
        record |= {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None], "AutoConfig": "own.OwnConfig"}}
        (copy / name).write_text(json.dumps(record | {"model_type": "own", "tokenizer_class": "OwnTokenizer"}))
    with pytest.raises(InputError, match="found no tokenizer"):
        load_tokenizer(str(copy))
    assert not (copy / "ran").exists()


def test_pickled_weights_are_not_opened(copy: Path, modality: TextModality, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for use in (lambda: build_model(f"hf:{copy}", modality, 2), lambda: text_models.HuggingFaceText(str(copy), 2, 0)):
        with pytest.raises(InputError, match=r"pytorch_model\.bin is not opened.*save_pretrained"):
            use()


def test_adapters_are_refused(copy: Path, modality: TextModality) -> None:
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(InputError, match="holds an adapter; merge it"):
        build_model(f"hf:{copy}", modality, 2)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"model_type": 7}', b"[" * 100_000])
def test_damaged_folders_are_input_errors(copy: Path, modality: TextModality, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    load_tokenizer.cache_clear()
    try:
        build_model(f"hf:{copy}", modality, 2)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert name == "tokenizer_config.json" and content in (b"{}", b'{"model_type": 7}')
