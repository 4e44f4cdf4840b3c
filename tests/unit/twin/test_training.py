"""Text, training, and what is kept of it: determinism, resuming, and files that were tampered with."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.unit.twin.tiny import documents, tiny, train, weights, write_text
from traces.container import TraceError
from traces.twin import checkpoint
from traces.twin.text import Tokenizer, load_documents, text_digest, token_stream
from traces.twin.train import CURVE, Pace, Start, Trainer, begin, load_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("twin") / "text")


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin") / "trained"
    train(folder, text, 6)
    return folder


@pytest.fixture
def spoiled(trained: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(trained, tmp_path / "spoiled"))


# -- text ----------------------------------------------------------------------------------------------------


def test_the_split_is_by_content_and_no_content_is_on_two_sides(text: Path, tmp_path: Path) -> None:
    by_split = documents(text)
    assert all(by_split.values())
    hashes = [{document.sha256 for document in some} for some in by_split.values()]
    assert sum(map(len, hashes)) == len(set.union(*hashes)) == 40
    moved = tmp_path / "moved"
    shutil.copytree(text, moved)
    (moved / "00.txt").rename(moved / "zz.txt")
    (moved / "copy.txt").write_text((moved / "01.txt").read_text())
    again = documents(moved)
    assert [{document.sha256 for document in some} for some in again.values()] == hashes


def test_the_standard_library_gives_sources_topics_and_builtins_and_no_paths_of_this_machine() -> None:
    found = load_documents()
    names = {document.name for document in found}
    assert {"json/decoder.py", "topic/for", "builtin/dict"} <= names
    assert not any("site-packages" in name or "_sysconfigdata" in name for name in names)
    assert len({document.sha256 for document in found}) == len(found) > 300
    assert {document.split for document in found} == {"learn", "train", "eval"}
    assert text_digest(found) == text_digest(load_documents())


def test_tokens_of_the_byte_pair_tokenizer_say_the_text_again(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    learned = documents(text)["learn"]
    made = Tokenizer.train([document.text for document in learned], 300)
    assert made.text() == Tokenizer.train([document.text for document in learned], 300).text()
    (tmp_path / "tokenizer.json").write_text(made.text())
    read = Tokenizer.read(tmp_path / "tokenizer.json")
    ids = read.encode(["experts, und Ünïcode"])[0]
    assert made._bpe.decode(ids.tolist()) == "experts, und Ünïcode"
    assert (read.size, read.end) == (made.size, made.end)
    stream = token_stream(learned, read)
    assert int((stream == read.end).sum()) == len(learned)
    assert 256 < read.size <= 300
    assert int(stream.max()) < read.size


def test_bytes_are_tokens_where_asked_for() -> None:
    plain = Tokenizer()
    assert plain.encode(["aü"])[0].tolist() == [97, 195, 188]
    assert (plain.size, plain.end, plain.text()) == (257, 256, "")


# -- training ------------------------------------------------------------------------------------------------


def test_the_loss_falls(text: Path, tmp_path: Path) -> None:
    train(tmp_path / "twin", text, 40, save_every=20)
    rows = [line.split(",") for line in (tmp_path / "twin" / "loss.csv").read_text().splitlines()]
    assert tuple(rows[0]) == CURVE
    assert [int(row[0]) for row in rows[1:]] == list(range(1, 41))
    loss, held_out = CURVE.index("loss"), CURVE.index("held_out_loss")
    assert float(rows[-1][loss]) < float(rows[1][loss]) - 0.5
    assert [row[held_out] != "" for row in rows[1:]] == [step % 20 == 0 for step in range(1, 41)]


def test_one_seed_gives_the_same_weights_and_another_others(text: Path, trained: Path, tmp_path: Path) -> None:
    again = weights(train(tmp_path / "again", text, 6).model)
    first = weights(checkpoint.read_model(trained, checkpoint.read_settings(trained))[0])
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    begin(tmp_path / "other", tiny(), Start(seed=1, batch=4, warmup=2, lr=0.01, tokenizer="bytes", text=str(text)))
    other = weights(train(tmp_path / "other", text, 6).model)
    assert not np.array_equal(first["head.weight"], other["head.weight"])


def test_a_stopped_run_goes_on_as_one_that_was_not(text: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    train(folder, text, 2)
    train(folder, text, 6)
    assert_same_files(folder, trained)
    steps = [line.split(",")[0] for line in (folder / "loss.csv").read_text().splitlines()[1:]]
    assert steps == list("123456")


def test_a_killed_run_goes_on_from_its_last_checkpoint(text: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    begin(folder, tiny(), Start(batch=4, warmup=2, lr=0.01, tokenizer="bytes", text=str(text)))
    trainer = Trainer(folder, Pace(steps=6, threads=1, log_every=1, save_every=2))

    def kill(line: str) -> None:
        if line.startswith("step 5:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(kill)
    left = folder / ".checkpoint-00000005.0123abcd.tmp"
    left.mkdir()
    assert [step for step, _ in checkpoint.checkpoints(folder)] == [4]
    train(folder, text, 6)
    assert_same_files(folder, trained)
    assert not left.exists()
    assert len((folder / "loss.csv").read_text().splitlines()) == 7


def assert_same_files(folder: Path, other: Path) -> None:
    """The same step, weights and moments."""
    (step, path), (other_step, other_path) = checkpoint.checkpoints(folder)[-1], checkpoint.checkpoints(other)[-1]
    assert step == other_step
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(path / name), load_file(other_path / name)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours), name


def test_minutes_end_a_run_and_no_step_is_lost(text: Path, tmp_path: Path) -> None:
    begin(tmp_path / "twin", tiny(), Start(batch=2, warmup=2, tokenizer="bytes", text=str(text)))
    trainer = Trainer(tmp_path / "twin", Pace(minutes=0.01, threads=1))
    step = trainer.run(lambda line: None)
    assert step > 0
    assert [found for found, _ in checkpoint.checkpoints(tmp_path / "twin")] == [step]


def test_bfloat16_trains_too(text: Path, tmp_path: Path) -> None:
    trainer = train(tmp_path / "twin", text, 3, bf16=True)
    assert trainer.step == 3
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_another_text_is_refused(text: Path, spoiled: Path, tmp_path: Path) -> None:
    settings = checkpoint.read_settings(spoiled)
    other = Path(shutil.copytree(text, tmp_path / "text"))
    (other / "00.txt").write_text("x" * 300)
    values = json.loads((spoiled / "twin.json").read_text()) | {"text": str(other)}
    (spoiled / "twin.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is not the text that the twin was begun with"):
        Trainer(spoiled, Pace(steps=7))
    assert load_text(settings)


# -- files that are not believed -----------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "twin.json").read_text())
    edit(folder / "twin.json", config=values["config"] | changes)


def rewrite(path: Path, **changes: Any) -> None:
    arrays = load_file(path) | changes
    save_file({name: array for name, array in arrays.items() if array is not None}, path)


HEAD = np.zeros((257, 16), np.float32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "twin.json").write_text("[]"), "holds a JSON list, not a table"),
        (lambda f: (f / "twin.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda f: (f / "twin.json").write_text(" " * (2 << 20)), "has more than 1048576 bytes"),
        (lambda f: edit(f / "twin.json", extra=1), "settings: are not balance, batch"),
        (lambda f: edit(f / "twin.json", batch=0), "batch=0"),
        (lambda f: edit(f / "twin.json", lr="fast"), "lr='fast'"),
        (lambda f: edit(f / "twin.json", tokenizer="pickle"), "tokenizer='pickle' is unknown"),
        (lambda f: edit_config(f, num_layers=10**8), "num_layers=100000000"),
        (lambda f: edit_config(f, num_experts=9), "needed is float32"),
        (lambda f: edit_config(f, width=8192), "needed is float32"),
        (lambda f: edit_config(f, vocab_size=300), "has 257 tokens, the model 300"),
        (lambda f: edit_config(f, num_layers=4), "is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is no tokenizer"),
        (lambda f: rewrite(f / MODEL, **{"head.weight": HEAD[:, :8]}), r"is float32 \[257, 8\]"),
        (lambda f: rewrite(f / MODEL, **{"head.weight": HEAD.astype(np.float64)}), "is float64"),
        (lambda f: rewrite(f / MODEL, **{"head.weight": HEAD * np.float32("nan")}), "not finite"),
        (lambda f: rewrite(f / MODEL, **{"head.weight": None}), "'head.weight': is missing"),
        (lambda f: rewrite(f / MODEL, **{"tail": HEAD}), "'tail': is unknown"),
        (lambda f: rewrite(f / MOMENTS, **{"exp_avg.head.weight": None}), "is missing"),
        (lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes()[:-4]), "truncated"),
        (lambda f: (f / MODEL).write_bytes(b"\x80\x04pickled, and longer than a header"), "a pickle"),
        (lambda f: edit(f / "checkpoint-00000006/state.json", step=7), "step: is 7"),
        (lambda f: edit(f / "checkpoint-00000006/state.json", seconds=-1), "seconds: is -1"),
        (lambda f: edit(f / "checkpoint-00000006/state.json", seconds=None), "seconds: is None"),
        (lambda f: (f / "loss.csv").write_text("a,b\n"), "is no loss curve"),
    ],
)
def test_a_spoiled_folder_is_refused_in_one_line(spoiled: Path, spoil: Any, message: str) -> None:
    spoil(spoiled)
    with pytest.raises(TraceError, match=message) as caught:
        Trainer(spoiled, Pace(steps=7))
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


MODEL, MOMENTS = "checkpoint-00000006/model.safetensors", "checkpoint-00000006/optimizer.safetensors"


def test_a_folder_without_a_checkpoint_or_without_a_twin_is_refused(text: Path, tmp_path: Path) -> None:
    begin(tmp_path / "twin", tiny(), Start(tokenizer="bytes", text=str(text)))
    with pytest.raises(TraceError, match="checkpoint: there is none"):
        checkpoint.read_model(tmp_path / "twin", checkpoint.read_settings(tmp_path / "twin"))
    with pytest.raises(TraceError, match="is not the folder of a twin"):
        checkpoint.read_settings(tmp_path)
